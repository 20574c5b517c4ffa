"""Every format that lists are published in: a small file of each, with its proxies and its refused records."""

# ruff: noqa: E501 -- a table reads better with a file on a line than with its lines told apart

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxystash import CacheEntry, ProxyAddress, Rejected
from proxystash.files import read_proxy_file
from proxystash.proxies import join_proxy_url


@dataclass
class Case:
    """A file: its name, what stands in it, and what comes of it, a proxy being shown as a URL with credentials."""

    name: str
    content: str | bytes
    proxies: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        start = self.content[:40]
        return f"{self.name} {start!r}"


def case(
    name: str, content: object, *proxies: str, refused: dict[str, str] | None = None, **options: Any
) -> Case:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return Case(name, text, list(proxies), refused or {}, options)


LINES = [
    case("a.txt", "192.0.2.1:80\n\ngw.example:81\n", "http://192.0.2.1:80", "http://gw.example:81"),
    case("a.txt", "socks5://192.0.2.1:80\nHTTP://GW.example.:080/\n", "socks5://192.0.2.1:80", "http://gw.example:80"),
    case("a.txt", "gw.example:80:ann:pw\n192.0.2.1:80:ann:p:w@1\n", "http://ann:pw@gw.example:80",
         "http://ann:p%3Aw%401@192.0.2.1:80"),
    case("a.txt", "brd-zone:31337:192.0.2.10:22225\nuser:12345:192.0.2.4:8080\nann:pw:gw.example:80\n",
         "http://brd-zone:31337@192.0.2.10:22225", "http://user:12345@192.0.2.4:8080", "http://ann:pw@gw.example:80"),
    case("a.txt", "ann:pw@gw.example:80\nann:8080@192.0.2.1:80\nann@gw.example:81\n", "http://ann:pw@gw.example:80",
         "http://ann:8080@192.0.2.1:80", "http://ann@gw.example:81"),
    case("a.txt", "gw.example:80@ann:pw\n192.0.2.1:80@ann:8080\n", "http://ann:pw@gw.example:80",
         "http://ann:8080@192.0.2.1:80"),
    case("a.txt", "socks5://gw.example:80:ann:pw\nsocks4://192.0.2.1:80@ann:8080\nsocks5://ann:8080@gw.example:81\n",
         "socks5://ann:pw@gw.example:80", "socks4://ann:8080@192.0.2.1:80", "socks5://ann:8080@gw.example:81"),
    case("a.txt", "[2001:db8::1]:80\n[2001:db8::2]:80:ann:pw\nann:pw@[2001:db8::3]:80\n2001:db8::4 80\n2001:db8::5:80\n",
         "http://[2001:db8::1]:80", "http://ann:pw@[2001:db8::2]:80", "http://ann:pw@[2001:db8::3]:80",
         "http://[2001:db8::4]:80", refused={"line 5": "must stand in brackets"}),
    case("a.txt", "192.0.2.1:80 # note\n192.0.2.2:80 // note\n192.0.2.3:1080 # socks5, slow\n", "http://192.0.2.1:80",
         "http://192.0.2.2:80", "socks5://192.0.2.3:1080"),
    case("a.txt", "192.0.2.1:80|US|elite\n192.0.2.2:80,US,elite\n192.0.2.3\t80\n192.0.2.4 80\n192.0.2.5:80;\n"
         "192.0.2.6:80:US\n192.0.2.7;80\n192.0.2.8:80 Germany Berlin 12ms\n",
         *(f"http://192.0.2.{n}:80" for n in range(1, 9))),
    case("a.txt", "192.0.2.1:1080:socks5\nsocks4:192.0.2.2:1080\n192.0.2.3:1080 SOCKS5 elite\nsocks5 192.0.2.4 1080\n"
         "socks4,192.0.2.5,1080,US\n192.0.2.6:1080 | http/socks5\n",
         "socks5://192.0.2.1:1080", "socks4://192.0.2.2:1080", "socks5://192.0.2.3:1080", "socks5://192.0.2.4:1080",
         "socks4://192.0.2.5:1080", "http://192.0.2.6:1080", "socks5://192.0.2.6:1080"),
    case("spys.txt", "Proxy list (#400) updated at Fri, 24 Mar 23 07:58:01 +0300\n"
         "IP address:Port CountryCode-Anonymity(Noa/Anm/Hia)-SSL_support(S)-Google_passed(+)\n\n"
         "192.0.2.207:999 CO-N-S! + \n192.0.2.156:80 HK-A + \n",
         "http://192.0.2.207:999", "http://192.0.2.156:80", refused={"line 1": "no address", "line 2": "no address"}),
    case("broker.txt", "<Proxy US 0.40s [HTTP: Anonymous] 192.0.2.1:80>\n<Proxy GB 0.15s [SOCKS4, SOCKS5] 192.0.2.2:81>\n",
         "http://192.0.2.1:80", "socks4://192.0.2.2:81", "socks5://192.0.2.2:81"),
    case("a.txt", '"192.0.2.25:80",\n\'192.0.2.26:80\'\n- 192.0.2.27:80\n1. 192.0.2.28:80\n"192.0.2.29","80","US"\n',
         *(f"http://192.0.2.{n}:80" for n in range(25, 30))),
    case("a.txt", "192.0.2.1:80, 192.0.2.2:80 192.0.2.3:99999\n", "http://192.0.2.1:80", "http://192.0.2.2:80",
         refused={"line 1": "the port is not a number"}),
    case("a.txt", "192.0.2.1,80\nbroken,x\nTotal:12 proxies\nat 10:30\n192.0.2.1:80 seen from 198.51.100.2:90\n",
         "http://192.0.2.1:80",
         refused={"line 2": "no address", "line 3": "no address", "line 4": "no address", "line 5": "several addresses"}),
    # Two ways, and so none; nor a password in a host's name.
    case("a.txt", "gw.example:80:user:8080\nann:8080@gw.example:80\n192.0.2.1:80:192.0.2.2:81\n192.0.2.1:80:US:elite\n"
         "http://gw.example:80:user:8080\n192.0.2.1:80:ann:p w\n192.0.2.1:80:ann:p,w\n192.0.2.1,80,ann,pw\n192.0.2.1:80\tann\tpw\n",
         refused={
             "line 1": "in two ways, as host:port:user:pass or as user:pass:host:port",
             "line 2": "in two ways, as user:pass@host:port or as host:port@user:pass",
             "line 3": "in two ways", "line 4": "what the proxy is like", "line 5": "in two ways",
             "line 6": "in two ways", "line 7": "in two ways", "line 8": "may be credentials",
             "line 9": "may be credentials",
         }),
    case("a.txt", "gw.example:80:user:8080\n192.0.2.1,80,ann,pw\ngw.example:81:ann:p;w\nann:pw@gw.example:80\n",
         "http://user:8080@gw.example:80", "http://ann:pw@192.0.2.1:80", "http://ann:p%3Bw@gw.example:81",
         refused={"line 4": "cannot be read as host:port:user:pass"}, format="host:port:user:pass"),
    case("a.txt", "ann:8080@gw.example:80\n", "http://ann:8080@gw.example:80", format="user:pass@host:port"),
    case("a.txt", "ann:8080@gw.example:80\n", "http://gw.example:80@ann:8080", format="host:port@user:pass"),
    case("a.txt", "gw.example:80:user:8080\n", "http://gw.example:80@user:8080", format="user:pass:host:port"),
    case("a.txt", "192.0.2.1:80:US:elite\n192.0.2.2,80,a,b\n", "http://192.0.2.1:80", "http://192.0.2.2:80",
         format="host:port"),
]  # fmt: skip

TABLES = [
    case("a.csv", "protocol,ip,port\nhttp,192.0.2.1,80\n", "http://192.0.2.1:80"),
    case("a.csv", "protocol;ip;port\nhttp;192.0.2.1;80\n", "http://192.0.2.1:80"),
    case("a.tsv", "protocol\tip\tport\nhttp\t192.0.2.1\t80\n", "http://192.0.2.1:80"),
    case("a.csv", "protocol|ip|port\nhttp|192.0.2.1|80\n", "http://192.0.2.1:80"),
    case("a.csv", "sep=;\r\nprotocol;ip;port\r\nhttp;192.0.2.1;80\r\n", "http://192.0.2.1:80"),
    case("a.csv", "\n\n# of 2024\n\nprotocol,ip,port\nhttp,192.0.2.1,80\n,,\n", "http://192.0.2.1:80"),
    case("a.csv", '"IP Address","Port","Code"\n"192.0.2.1","80","US"\n', "http://192.0.2.1:80"),
    case("a.csv", 'ip, port, username, password\n192.0.2.1, 80, ann, "p,w"\n', "http://ann:p%2Cw@192.0.2.1:80"),
    case("a.csv", "#,ip,port\n1,192.0.2.1,80\n", "http://192.0.2.1:80"),
    case("free.csv", "IP Address,Port,Code,Country,Anonymity,Google,Https,Last Checked\n"
         "192.0.2.9,80,US,United States,anonymous,no,yes,20 secs ago\n", "http://192.0.2.9:80"),
    case("a.csv", "proxy,country\n192.0.2.1:80,US\nsocks5://192.0.2.2:80,\n192.0.2.3:80:ann:pw,\n", "http://192.0.2.1:80",
         "socks5://192.0.2.2:80", "http://ann:pw@192.0.2.3:80"),
    case("a.csv", "socks5://192.0.2.47:4145,ZZ,Unknown\nhttp://192.0.2.48:80,US,Unknown\n", "socks5://192.0.2.47:4145",
         "http://192.0.2.48:80"),
    case("a.csv", "broken,x\n192.0.2.1,80\n192.0.2.2,8080\n", "http://192.0.2.1:80", "http://192.0.2.2:8080",
         refused={"line 1": "no address"}),
    case("a.csv", "ip,port,protocols\n192.0.2.1,80,http\n192.0.2.2,81,http|socks4|socks5\n192.0.2.3,82,http|vmess\n",
         "http://192.0.2.1:80", "http://192.0.2.2:81", "socks4://192.0.2.2:81", "socks5://192.0.2.2:81",
         "http://192.0.2.3:82", refused={"line 4": "protocols is none of"}),
    case("a.csv", "ip;port;http;ssl;socks4;socks5\n192.0.2.1;80;1;0;0;0\n192.0.2.2;81;0;0;1;1\n192.0.2.3;82;0;0;0;0\n"
         "192.0.2.4;83;0;maybe;0;0\n", "http://192.0.2.1:80", "socks4://192.0.2.2:81", "socks5://192.0.2.2:81",
         refused={"line 4": "says yes", "line 5": "neither yes nor no"}),
    case("a.csv", "http,https,socks4,socks5\n192.0.2.50:80,,192.0.2.52:41,http://192.0.2.53:80\n,,,\n-,192.0.2.51:80,,\n",
         "http://192.0.2.50:80", "socks4://192.0.2.52:41", "https://192.0.2.51:80",
         refused={"line 2": "another scheme"}),
    case("a.csv", "proxy,type\n192.0.2.1:80,Elite\n192.0.2.2:80,SOCKS4/5\n192.0.2.3:80,socks\n192.0.2.4:80,what is this\n", "http://192.0.2.1:80",
         "socks4://192.0.2.2:80", "socks5://192.0.2.2:80", refused={"line 4": "socks does not say which", "line 5": "type is none of"}),
    case("a.csv", "ip,port\n192.0.2.1,80,\n192.0.2.2,80,x\nip,port\n192.0.2.3\n192.0.2.4:81,\n# of https://a.example, SOCKS5\n# SOCKS5 (1)\n192.0.2.5,1080\n",
         "http://192.0.2.1:80", "http://192.0.2.4:81", "socks5://192.0.2.5:1080",
         refused={"line 3": "3 fields, where the header row has 2", "line 5": "no port"}),
    # Damaged quotes.
    case("a.csv", 'protocol,ip,port,city\nhttp,192.0.2.1,80,"St. John\'s\nhttp,192.0.2.2,80,Paris\nsocks5,192.0.2.4,81,Berlin\n',
         "http://192.0.2.1:80", "http://192.0.2.2:80", "socks5://192.0.2.4:81"),
    case("a.csv", 'protocol,ip,port,isp\nhttp,192.0.2.1,80,"Acme 20" Net\nhttp,192.0.2.2,80,x\nhttp,192.0.2.3,80,"Foo, Inc"\n',
         "http://192.0.2.1:80", "http://192.0.2.2:80", "http://192.0.2.3:80"),
    case("a.csv", 'ip,port,username,password\n192.0.2.1,80,ann,"p"w\n192.0.2.2,80,ann,"pw\n192.0.2.3,80,"ann,pw\n192.0.2.4,80,ann,pw\n'
         '192.0.2.5,80,ann,"p""w"\n', "http://ann:pw@192.0.2.4:80", "http://ann:p%22w@192.0.2.5:80",
         refused={"line 2": "a quote is not closed", "line 3": "a quote is not closed", "line 4": "a quote is not closed"}),
    case("a.csv", 'ip,port,note\n192.0.2.1,80,"a\n192.0.2.2,80,b"\n192.0.2.3,80,"c\nd,e\nf"\n192.0.2.4,80,"g\n192.0.2.5,80,"\n',
         *(f"http://192.0.2.{n}:80" for n in range(1, 6))),
    case("a.csv", 'ip,port,note\n192.0.2.1,80,"a\n192.0.2..2,80,"\n192.0.2.3,80,"b\n192.0.2.300:80,"\n', "http://192.0.2.1:80",
         "http://192.0.2.3:80", refused={"line 3": "neither a name nor an IP", "line 5": "a quote is not closed"}),
    case("a.csv", "protocol,ip,port,city\nhttp,192.0.2.1,80,S\xe3o\nhttp,192.0.2.\xe3,80,x\n".encode("latin-1"),
         "http://192.0.2.1:80", refused={"line 3": "not UTF-8"}),
]  # fmt: skip

DOCUMENTS = [
    case("a.json", ["192.0.2.1:80", "socks5://192.0.2.2:1080", "192.0.2.3:80:ann:pw"], "http://192.0.2.1:80",
         "socks5://192.0.2.2:1080", "http://ann:pw@192.0.2.3:80"),
    case("geonode.json", {"data": [{"ip": "192.0.2.75", "port": "3389", "protocols": ["socks5"], "country": "CL"}], "total": 1},
         "socks5://192.0.2.75:3389"),
    case("webshare.json", {"results": [{"proxy_address": "192.0.2.1", "port": 81, "username": "u", "password": "p"}]},
         "http://u:p@192.0.2.1:81"),
    case("a.json", {"data": {"proxies": [{"host": "gw.example", "port": 8080.0}]}}, "http://gw.example:8080"),
    case("proxyscrape.json", {"proxies": [{"proxy": "http://192.0.2.90:80", "protocol": "http", "ip": "192.0.2.90", "port": 80,
         "ssl": True, "ip_data": {"countryCode": "DE"}}]}, "http://192.0.2.90:80"),
    case("proxifly.json", [{"proxy": "socks5://192.0.2.47:41", "protocol": "socks5", "ip": "192.0.2.47", "port": 41,
         "https": False}], "socks5://192.0.2.47:41"),
    case("jetkai.json", {"http": ["192.0.2.1:80"], "socks4": ["192.0.2.2:41", {"ip": "192.0.2.3", "port": 42}]},
         "http://192.0.2.1:80", "socks4://192.0.2.2:41", "socks4://192.0.2.3:42"),
    case("a.json", {"metadata": {"n": 1}, "proxies": {"http": ["192.0.2.1:80"], "socks5": ["192.0.2.2:81"]}},
         "http://192.0.2.1:80", "socks5://192.0.2.2:81"),
    case("a.json", {"http": ["192.0.2.1:80", "socks5://192.0.2.2:80"], "vmess": ["192.0.2.3:80"], "socks": ["192.0.2.4:80"],
         "sources": ["https://list.example/"]}, "http://192.0.2.1:80",
         refused={"record 2": "another scheme", "record 3": "protocol is none of", "record 4": "socks does not say"}),
    case("a.json", {"ip": "192.0.2.1", "port": 80, "type": ["http", "socks5"]}, "http://192.0.2.1:80", "socks5://192.0.2.1:80"),
    case("a.json", {"http": "192.0.2.1:80", "socks5": "192.0.2.2:80"}, "http://192.0.2.1:80", "socks5://192.0.2.2:80"),
    case("sunny.json", [{"ip": "192.0.2.1", "port": "8885", "country": "Bangladesh - Xā", "type": "HTTP/SOCKS5"}],
         "http://192.0.2.1:8885", "socks5://192.0.2.1:8885"),
    case("a.json", [{"server": "http://gw.example:80", "username": "u"}, {"proxy": "gw.example:80:user:8080"},
         {"proxy": "http://h.example", "port": 3}, {"proxy": "192.0.2.1:80", "protocol": "SOCKS 4"}],
         "http://u@gw.example:80", "http://h.example:3", "socks4://192.0.2.1:80", refused={"record 2": "in two ways"}),
    case("a.jsonl", '{"proxy":"192.0.2.1:80"}\n"192.0.2.2:80"\n["192.0.2.3:80",{"ip":"192.0.2.4","port":80}]\n{x\n5\n',
         *(f"http://192.0.2.{n}:80" for n in range(1, 5)),
         refused={"line 4": "not JSON: Expecting property name", "line 5": "neither an object nor a text"}),
    case("a.json", '{"proxy":"192.0.2.1:80"}\n{"proxy":"192.0.2.2:80"}\n', "http://192.0.2.1:80", "http://192.0.2.2:80"),
    # Damaged documents.
    case("a.json", '[{"ip":"192.0.2.1","port":1},{"ip":"192.0.2.2","port":},{"ip":"192.0.2.3","port":3},{"ip":"192.0.2.4","po',
         "http://192.0.2.1:1", "http://192.0.2.3:3", refused={"record 2": "not JSON", "record 4": "nothing after it"}),
    case("a.json", '{"proxies":["192.0.2.1:1","192.0.2.2:2,"192.0.2.3:3" "192.0.2.4:4",],"n":[1]}', "http://192.0.2.1:1",
         "http://192.0.2.3:3", "http://192.0.2.4:4", refused={"record 2": "not JSON"}),
    case("a.json", '[{"ip":"192.0.2.1","port":1}{"ip":"192.0.2.2","port":2},{"ip":"192.0.2.3","port":3}]',
         *(f"http://192.0.2.{n}:{n}" for n in range(1, 4))),
    case("a.json", '{"http":["192.0.2.1:1","192.0.2.2:2],"socks5":["192.0.2.3:3","192.0.2.4:4"],"n":[1]}', "http://192.0.2.1:1",
         "socks5://192.0.2.3:3", "socks5://192.0.2.4:4", refused={"record 2": "not JSON"}),
    case("a.json", '{"http":[{"ip":"192.0.2.1","port":},{"ip":"192.0.2.2","port":],"socks4":[{"ip":"192.0.2.3","port":3}]}',
         "socks4://192.0.2.3:3", refused={"record 1": "not JSON", "record 2": "not JSON"}),
    case("a.json", '[{"ip":"192.0.2.1","port":1,"x":' + "[" * 100_000 + "]" * 100_000 + '},{"ip":"192.0.2.3","port":3}]',
         "http://192.0.2.3:3", refused={"record 1": "nested too deeply"}),
    case("a.json", b'["192.0.2.1:1","192.0.2.\xff:2",{"ip":"192.0.2.3","port":3,"city":"S\xe3o"}]', "http://192.0.2.1:1",
         "http://192.0.2.3:3", refused={"record 2": "not UTF-8"}),
]  # fmt: skip

YAML = [
    case("clash.yaml", "proxies:\n  - {name: a, type: socks5, server: 192.0.2.3, port: 1080, username: u, password: p}\n",
         "socks5://u:p@192.0.2.3:1080"),
    case("clash.yml", "mixed-port: 7890\nproxies:\n- name: b\n  type: http\n  server: 192.0.2.2\n  port: 443\n  username: yes\n"
         "  password: 012:30\n  tls: true\n- {type: ss, server: 192.0.2.1, port: 1}\n"
         "- {type: socks5, server: 192.0.2.3, port: 1080, tls: true}\n- 192.0.2.4:80\nrules: []\n",
         "https://yes:012%3A30@192.0.2.2:443", "http://192.0.2.4:80",
         refused={"record 2": "type is none of", "record 3": "tls goes with type http alone"}),
    case("a.yaml", "base: &b {type: http, port: 80}\nproxies:\n  - {<<: *b, server: 192.0.2.1}\n", "http://192.0.2.1:80"),
    case("a.yaml", "proxies:\n  - {type: http, server: 192.0.2.1, port: 1}\n  - {type: http, server: [192.0.2.2, port: 1}\n"
         "stray: 1\n  - {type: http, server: 192.0.2.3, port: 1}\nproxy-groups:\n  - {name: x}\n",
         "http://192.0.2.1:1", "http://192.0.2.3:1", refused={"record 2": "not YAML"}),
]  # fmt: skip

UNNAMED = [
    case("list", "192.0.2.1:80\n", "http://192.0.2.1:80"),
    case("list", "ip,port\n192.0.2.1,80\n", "http://192.0.2.1:80"),
    case("list", "\ufeffsep=;\nip;port\n192.0.2.1;80\n", "http://192.0.2.1:80"),
    case("list.txt", '[{"ip":"192.0.2.1","port":80}]', "http://192.0.2.1:80"),
    case("list", '{"ip":"192.0.2.1","port":80}\n{"ip":"192.0.2.2","port":80}\n', "http://192.0.2.1:80", "http://192.0.2.2:80"),
    case("list", '{\n "data": ["192.0.2.1:80"]\n}', "http://192.0.2.1:80"),
    case("list", "# of 2024\nmixed-port: 7890\nproxies:\n  - {type: http, server: 192.0.2.1, port: 80}\n", "http://192.0.2.1:80"),
    case("list", "[2001:db8::1]:80\n[socks5]\n[2001:db8::1]:80\n", "http://[2001:db8::1]:80", "socks5://[2001:db8::1]:80"),
    case("list.txt", "[[ SOCKS5 ]]\n192.0.2.1:80\n", "socks5://192.0.2.1:80"),
    case("list.txt.gz", gzip.compress(b"192.0.2.1:80\n"), "http://192.0.2.1:80"),
    case("list.csv.gz", gzip.compress(b"ip,port\n192.0.2.1,80\n"), "http://192.0.2.1:80"),
    case("list", gzip.compress(b'["192.0.2.1:80"]'), "http://192.0.2.1:80"),
    case("list.dat", '"192.0.2.1:80"\n', "http://192.0.2.1:80", format="jsonl"),
    case("list.json", "192.0.2.1:80\n", "http://192.0.2.1:80", format="text"),
]  # fmt: skip

SCHEMES = [
    case("a.txt", "# SOCKS5 Proxies (2)\n192.0.2.1:1\n# HTTP proxies (elite)\n192.0.2.2:1\n# checked on Monday, socks4 too\n"
         "192.0.2.3:1\n### SOCKS4 ###\n192.0.2.4:1\nHTTPS:\n192.0.2.5:1\n[socks4a]\n192.0.2.6:1\n; http, of https://a.example\n"
         "192.0.2.7:1\n# type: socks5h\n192.0.2.8:1\nhttp://192.0.2.9:1\n",
         "socks5://192.0.2.1:1", "http://192.0.2.2:1", "http://192.0.2.3:1", "socks4://192.0.2.4:1", "https://192.0.2.5:1",
         "socks4a://192.0.2.6:1", "socks4a://192.0.2.7:1", "socks5h://192.0.2.8:1", "http://192.0.2.9:1"),
    case("a.txt", "# SOCKS5\n192.0.2.1:1\n# Shadowsocks (1)\n192.0.2.2:1\n# SOCKS4/SOCKS5\n192.0.2.3:1\n# HTTP/HTTPS\n192.0.2.4:1\n",
         "socks5://192.0.2.1:1", "http://192.0.2.4:1",
         refused={"line 4": "the header above them says shadowsocks", "line 6": "says socks4 and socks5"}),
    case("a.txt", "# SOCKS5\n192.0.2.1:1\nhttp://192.0.2.2:1\nsocks://192.0.2.3:1\n", "socks4://192.0.2.1:1",
         "http://192.0.2.2:1", "socks4://192.0.2.3:1", scheme="socks4"),
    case("socks5.txt", "192.0.2.1:1\nhttp://192.0.2.2:1\n", "socks5://192.0.2.1:1", "http://192.0.2.2:1"),
    case("SOCKS4_proxies.txt.gz", gzip.compress(b"192.0.2.1:1\n"), "socks4://192.0.2.1:1"),
    case("socks5proxies.csv", "ip,port\n192.0.2.1,1\n", "socks5://192.0.2.1:1"),
    case("free-socks4-list.json", ["192.0.2.1:1"], "socks4://192.0.2.1:1"),
    case("lists/socks5/data.txt", "192.0.2.1:1\n", "socks5://192.0.2.1:1"),
    case("socks.txt", "192.0.2.1:1\n", refused={"line 1": "says socks and not which"}),
    case("http_socks5.txt", "192.0.2.1:1\n", refused={"line 1": "says http and socks5"}),
    case("vmess.txt", "192.0.2.1:1\n", refused={"line 1": "says vmess"}),
    case("socks.txt", "192.0.2.1:1\n", "socks5://192.0.2.1:1", scheme="socks5"),
]  # fmt: skip

SPELLINGS = [
    case("a.txt", "http://gw.example:80\nhttp://gw.example.:80\nhttp://GW.example:080\n", "http://gw.example:80",
         refused={"line 2": "duplicate of line 1", "line 3": "duplicate of line 1"}),
    case("a.txt", "[2001:db8::1]:80\n[2001:DB8:0:0:0:0:0:1]:80\n192.0.2.1:80\n[::ffff:192.0.2.1]:80\n",
         "http://[2001:db8::1]:80", "http://192.0.2.1:80",
         refused={"line 2": "duplicate of line 1", "line 4": "duplicate of line 3"}),
    case("a.txt", "http://bücher.example:80\nhttp://xn--bcher-kva.example:80\n", "http://xn--bcher-kva.example:80",
         refused={"line 2": "duplicate of line 1"}),
    case("a.txt", "http://user:a@gw.example:80\nhttp://user:b@gw.example:80\nhttp://user:a@gw.example:80\n",
         "http://user:a@gw.example:80",
         refused={"line 2": "differs in the password alone", "line 3": "duplicate of line 1"}),
    case("a.txt", "http://user:a@gw.example:80\nhttp://user:b@gw.example:80\nhttp://user:a@gw.example:80\n",
         "http://user:a@gw.example:80", "http://user:b@gw.example:80", refused={"line 3": "duplicate of line 1"},
         identity="user+password"),
    case("a.txt", "http://ann:a@gw.example:80\nhttp://bob:b@gw.example:80\n", "http://ann:a@gw.example:80",
         refused={"line 2": "duplicate of line 1"}, identity="url"),
    case("a.jsonl", '{"url":"http://u:a@gw.example:80","key":"one"}\n{"url":"http://u:b@gw.example:80","key":"two"}\n',
         "http://u:a@gw.example:80", "http://u:b@gw.example:80"),
]  # fmt: skip

CASES = [*LINES, *TABLES, *DOCUMENTS, *YAML, *UNNAMED, *SCHEMES, *SPELLINGS]


def shown(entry: CacheEntry) -> str:
    return join_proxy_url(ProxyAddress(entry.proxy_url, entry.username, entry.password))


def read(case: Case) -> list[CacheEntry | Rejected]:
    content = case.content.encode() if isinstance(case.content, str) else case.content
    return [*read_proxy_file(io.BytesIO(content), name=case.name, **case.options)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_list_gives_its_proxies_and_refuses_the_other_records(case: Case) -> None:
    outcomes = read(case)

    assert [shown(outcome) for outcome in outcomes if isinstance(outcome, CacheEntry)] == case.proxies
    refused = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    assert [rejected.where for rejected in refused] == [*case.refused]
    for rejected, reason in zip(refused, case.refused.values(), strict=True):
        assert reason in rejected.reason


@pytest.mark.parametrize(
    ("name", "content", "country"),
    [
        ("a.txt", "192.0.2.1:80 CO-N-S! +\n", "CO"),
        ("a.txt", "192.0.2.1:80|US|elite\n", "US"),
        ("a.txt", "192.0.2.1:80:DE\n", "DE"),
        ("a.txt", "192.0.2.1:80,NO,YES\n", None),
        ("a.txt", "192.0.2.1:80,ZZ,Unknown\n", None),
        ("a.txt", "<Proxy GB 0.15s [HTTP] 192.0.2.1:80>\n", "GB"),
        ("a.csv", "IP Address,Port,Code,Country\n192.0.2.1,80,us,United States\n", "US"),
        ("a.json", '[{"proxy":"192.0.2.1:80","geolocation":{"country":"US","city":"Unknown"}}]', "US"),
        ("a.json", '[{"proxy":"192.0.2.1:80","ip_data":{"countryCode":"DE"}}]', "DE"),
        ("a.json", '[{"proxy":"192.0.2.1:80","country":"Unknown"}]', None),
    ],
)
def test_a_country_is_found_where_the_list_has_it(name: str, content: str, country: str | None) -> None:
    (entry,) = read_proxy_file(io.BytesIO(content.encode()), name=name)

    assert isinstance(entry, CacheEntry)
    assert entry.labels == ({"country": country} if country else {})


@pytest.mark.parametrize(
    ("name", "content", "notices"),
    [
        ("a.txt", "192.0.2.1:80\n192.0.2.1:80\nhttp://192.0.2.2:80\n", {"no scheme was given, http was taken": 1}),
        ("socks5.txt", "192.0.2.1:80\n", {"no scheme was given, socks5 was taken from the name socks5.txt": 1}),
        ("a/socks4/b.txt", "192.0.2.1:80\n", {"no scheme was given, socks4 was taken from the name of the folder socks4": 1}),
        ("a.txt", "# HTTP/HTTPS\n192.0.2.1:80\n", {"http was taken where http and https were named together": 1}),
        ("a.csv", 'protocol,ip,port,city\nhttp,192.0.2.1,80,"a\n', {"city could not be read and was left out": 1}),
        ("a.csv", "protocol,ip,port,status\nhttp,192.0.2.1,80,active\nhttp,192.0.2.2,80,ok\nhttp,192.0.2.2,80,up\n",
         {"status could not be read and was left out": 2}),
        ("a.txt", "# SOCKS5\n192.0.2.1:80\n", {}),
    ],
)  # fmt: skip
def test_what_is_guessed_or_left_out_is_said_with_how_often(
    name: str, content: str, notices: dict[str, int]
) -> None:
    reader = read_proxy_file(io.BytesIO(content.encode()), name=name)

    assert [outcome for outcome in reader if isinstance(outcome, CacheEntry)]
    assert reader.notices == notices

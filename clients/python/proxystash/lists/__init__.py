"""Lists of proxies in every format that the field publishes: reading, and writing some. No gRPC here.

The way of a record: `opening` gives lines or a document; `reader` says who reads it: `text`, `tables`,
`documents` or `clash`. These give raw records, and `records` makes entries of them, with `addresses` for
where the proxy is, `words` for what its fields may be called, and `fields` for what they hold.
`proxystash.files` is the public face.
"""

"""A guard against slow-downs that no clock can see: the CPU instructions of the hot paths, by callgrind.

`scripts/instructions` counts what one operation of each path executes, and compares with `baseline.json`:

    scripts/instructions                   # exit code 1 if a path grew by more than the tolerance
    scripts/instructions --only 'put|rpc'  # the paths whose names match
    scripts/instructions --against HEAD~1  # count that revision here too, and compare with it
    scripts/instructions --update          # after a change that is worth its cost: make this the baseline

The figures do not depend on the load of the machine, but they do on how Python and the native libraries were
built. Where those are not the baseline's there is no verdict (exit code 3), and `--against` gives one. What
instructions do not show: waiting for locks and for the disk, the kernel's work, and misses of the processor's
caches. scripts/bench measures those.
"""

import sys

from benchmarks import ops

SUITES = {"ops": ops.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        sys.exit(f"usage: python -m benchmarks {{{','.join(SUITES)}}} ...")
    SUITES[sys.argv[1]](sys.argv[2:])

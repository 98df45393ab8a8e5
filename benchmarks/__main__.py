import sys
from importlib import import_module

SUITES = ("ops", "host", "memory", "training", "forward", "report")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        sys.exit(f"usage: python -m benchmarks {{{','.join(SUITES)}}} ...")
    import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])

import sys

from llm_adapters.cli import main

if __name__ == "__main__":
    sys.exit(main())

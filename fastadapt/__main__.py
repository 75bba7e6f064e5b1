"""``python -m fastadapt``, which is what ``torchrun -m fastadapt`` starts."""

from fastadapt.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

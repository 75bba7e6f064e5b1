"""``python -m fastadapt``, which is what ``torchrun -m fastadapt`` starts."""

from fastadapt.cli import main

raise SystemExit(main())

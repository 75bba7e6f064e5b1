"""Commands `fastadapt graph`, `fastadapt graph export` and `fastadapt graph serve`."""

"""Read and write other projects' formats, one module per format, without those projects."""

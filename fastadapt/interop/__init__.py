"""Other projects' formats, one file each; read and written without those projects."""

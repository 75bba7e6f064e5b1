"""Transcoder adapters and their files."""

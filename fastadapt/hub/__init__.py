"""Runs on the Hugging Face hub: names, download, upload, model cards."""

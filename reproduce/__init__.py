"""One-off experiments: the embedded pair's recipe, the feature study, the README's runs."""

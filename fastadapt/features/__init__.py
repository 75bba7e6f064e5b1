"""Find out what an adapter's features mean: collect, browse, describe, judge and select them."""

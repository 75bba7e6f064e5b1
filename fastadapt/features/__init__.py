"""What the features of an adapter mean: collected, browsed, described, judged, selected."""

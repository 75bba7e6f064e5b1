"""P(word) at labelled positions of texts against matched positions, without sampling."""

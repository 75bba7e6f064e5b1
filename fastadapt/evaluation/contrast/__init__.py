"""P(word) at labelled places of texts against matched places, without sampling."""

"""Programs that make what the product ships; the product itself imports none of them."""

"""LayerNorm, RMSNorm and their modulated forms."""

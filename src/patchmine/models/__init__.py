"""Networks that several methods use: decoders, heads, teachers, stochastic depth and noise."""

"""Networks that several methods use: tokens in and out of a timm ViT, decoders, teachers, position
tables, weights.
"""

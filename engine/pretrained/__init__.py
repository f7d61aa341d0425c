"""Pretrained models as the base (--init): their tokenizers (bpe.py), prompts (chat.py) and weights (weights.py)."""

"""The tokenizer: a tiktoken.Encoding that is made here, without a download.

The vocabulary holds the 256 bytes, then a short list of word pieces that count as one token each (the four tags, the
two speakers, a few words), then the only special token, end of text. Digits stay single tokens: a model that reads "56"
as "5", "6" can learn to carry. Any UTF-8 text can be encoded and decoded, because every byte is a token.

subtle: tiktoken first splits a text with a regular expression, and then looks up each piece of the text. So the pattern
must split off each word piece, or its token is never used. It splits all other text into single characters.

Encode text from outside with `encode_ordinary`. It treats "<|endoftext|>" as thirteen plain characters, so that no
input can inject the end-of-text token.

    >>> encoding = get_tokenizer()
    >>> [encoding.decode([t]) for t in encoding.encode_ordinary("<think>8*7=56</think>")]
    ['<think>', '8', '*', '7', '=', '5', '6', '</think>']
"""
import functools
import re

import tiktoken

PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "User: ", "\nAssistant: ", "Facts:\n", ", ", ". ",
    "wait", "check", "hmm", "so", "it is", "right", "I think", "about", "first", "then", "answer",
)
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256 + len(PIECES)


@functools.cache
def get_tokenizer(pieces: tuple[str, ...] = PIECES) -> tiktoken.Encoding:
    """The Encoding: ids 0 to 255 are the bytes, then come the pieces, then end of text (its `eot_token`)."""
    ranks = {bytes([b]): b for b in range(256)} | {piece.encode(): 256 + i for i, piece in enumerate(pieces)}
    longest_first = sorted(pieces, key=len, reverse=True)
    pattern = "|".join(re.escape(piece) for piece in longest_first) + r"|[\s\S]"
    return tiktoken.Encoding("nanor1", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)}, explicit_n_vocab=len(ranks) + 1)

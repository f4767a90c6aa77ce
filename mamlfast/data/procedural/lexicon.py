"""The words, symbols and letters that the procedural families speak of.

A few dozen short words in eight categories of eight: enough for fresh combinations without end, few enough
that a small vocabulary gives each of them a token.
"""

CATEGORIES = {
    "animal": ("cat", "dog", "cow", "hen", "fox", "pig", "bee", "ant"),
    "colour": ("red", "blue", "green", "pink", "grey", "gold", "black", "white"),
    "fruit": ("apple", "pear", "plum", "fig", "lime", "grape", "melon", "peach"),
    "tool": ("saw", "axe", "drill", "nail", "rope", "fork", "knife", "brush"),
    "place": ("park", "shop", "farm", "lake", "hill", "beach", "school", "tower"),
    "body": ("hand", "foot", "nose", "ear", "knee", "neck", "back", "arm"),
    "sky": ("sun", "moon", "star", "cloud", "rain", "snow", "wind", "storm"),
    "verb": ("run", "jump", "sing", "read", "eat", "sleep", "swim", "dance"),
}
WORDS = tuple(word for words in CATEGORIES.values() for word in words)
NOUNS = tuple(word for name, words in CATEGORIES.items() if name != "verb" for word in words)
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}

# Words without a meaning of their own, for labels that only the task itself can explain.
LABELS = (
    "dax", "wug", "fep", "zorp", "blick", "tova", "mib", "kip", "lorp", "gazzer", "pim", "vost",
    "quen", "rill", "sarn", "tulk", "yeb", "hux", "jeft", "nop", "ooli", "plif", "cray", "dern",
)  # fmt: skip

SYMBOLS = tuple("# % @ & * + ? ! ~ ^".split())
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
DIGITS = tuple("0123456789")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

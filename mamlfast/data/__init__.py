"""Tasks, prompts and episodes.

A source (``procedural``, ``metaicl``, ``hub``) gives a ``Suite`` of tasks, a ``Prompter`` turns examples into
token ids, and an ``EpisodeSampler`` draws episodes for the engine.
"""

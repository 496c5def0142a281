"""Clips in several modalities, with the emotion or sentiment of each.

`catalog`: facts of the sets, known without loading them. `sources`: where each is looked for. `readers`: files in their
publishers' own layouts. `clips`: what all of them become, checked. `planted`: pictures in strips, with conflicts that
are known. `extract`: from a folder of clips to features. `module`: `EmotionDataModule`.
"""

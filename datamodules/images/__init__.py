"""Labelled images.

`catalog`: facts of the data sets, known without loading them. `sources`: where each set is looked for. `formats`: safe
readers of its files. `module`: `ImageDataModule`, sets that fit into memory. `stream`: `ImageFolderStream`, folders too
large for that. `substitute`: other training sets beside the real evaluation sets. `subset`: chosen items as one.
`bank`: images that stand for data which may not be used. `resources`: the packaged subset.
"""

from .pictures import selection_pictures as selection_pictures
from .scores import random_views as random_views
from .scores import texture as texture

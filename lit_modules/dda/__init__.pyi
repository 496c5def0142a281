from .teacher import Teacher as Teacher

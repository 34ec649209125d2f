def insert(model, name, at="conv", **kwargs):
    raise NotImplementedError

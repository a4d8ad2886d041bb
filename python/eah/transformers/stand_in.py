"""An object in place of a method of a model, as an attribute of that model; copied and pickled with it."""

from __future__ import annotations


class StandIn:
    """Stands in for the method `name`, also where the model's owner has set one on the instance: that is called."""

    name: str

    def __init__(self, model):
        self.model = model
        self.owners = None  # what the owner had set

    def attach(self) -> None:
        self.owners = vars(self.model).get(self.name)
        setattr(self.model, self.name, self)

    def detach(self) -> None:
        if vars(self.model).get(self.name) is not self:
            return  # not attached, or the owner has set another one meanwhile
        delattr(self.model, self.name)
        if self.owners is not None:
            setattr(self.model, self.name, self.owners)

    def original(self, *args, **kwargs):
        if self.owners is not None:
            return self.owners(*args, **kwargs)
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)

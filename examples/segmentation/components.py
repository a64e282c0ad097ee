from .sliding import largest_component as largest_component

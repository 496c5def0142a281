from .client import client_app as client_app
from .member import Member as Member
from .member import build as build
from .server import FederationStrategy as FederationStrategy
from .server import server_app as server_app
from .simulation import simulate as simulate

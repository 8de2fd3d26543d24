"""Control: which expert versions are live, how they are replaced, and what runs where. Never on a request's path."""

from protos import control_pb2, status_pb2

CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ExpertControl"].full_name
FEED_SERVICE = control_pb2.DESCRIPTOR.services_by_name["RolloutFeed"].full_name
STATUS_SERVICE = status_pb2.DESCRIPTOR.services_by_name["SystemStatus"].full_name

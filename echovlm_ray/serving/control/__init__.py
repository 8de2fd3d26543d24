"""Control, the control plane: live expert versions, rollouts, and the system's status. Not on the path of requests."""

from protos import control_pb2, status_pb2

CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ExpertControl"].full_name
FEED_SERVICE = control_pb2.DESCRIPTOR.services_by_name["RolloutFeed"].full_name
STATUS_SERVICE = status_pb2.DESCRIPTOR.services_by_name["SystemStatus"].full_name

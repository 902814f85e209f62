"""Brokers behind a proxy of their own, which may cut them off from all of their clients."""

from deploy.apache_kafka import KafkaNode, LocalApacheKafka
from deploy.local import LocalKafka
from deploy.process import free_port
from tests.faults.proxy import HOST, Proxy


class ProxiedTansu(LocalKafka):
    """Tansu behind a proxy: what its clients are told is the proxy's address."""

    proxy: Proxy | None = None

    def _arguments(self) -> list[str]:
        if self.proxy is None:
            self.proxy = Proxy(self.port).__enter__()
        arguments = super()._arguments()
        at = arguments.index("--advertised-listener-url") + 1
        arguments[at] = f"tcp://{HOST}:{self.proxy.port}"
        return arguments


class ProxiedNode(KafkaNode):
    """Apache Kafka's server behind a proxy; what it tells itself takes another way."""

    proxy: Proxy | None = None

    def _settings(self) -> dict[str, object]:
        self.proxy = Proxy(self.port).__enter__()
        settings = super()._settings()
        inside = f"INSIDE://{HOST}:{free_port()}"
        return settings | {
            "listeners": f"{settings['listeners']},{inside}",
            "advertised.listeners": f"PLAINTEXT://{HOST}:{self.proxy.port},{inside}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,"
            "INSIDE:PLAINTEXT",
            "inter.broker.listener.name": "INSIDE",
        }


class ProxiedApacheKafka(LocalApacheKafka):
    """One broker behind a proxy."""

    node = ProxiedNode

    @property
    def proxy(self) -> Proxy | None:
        """The way to its one broker."""
        (node,) = self.nodes
        assert isinstance(node, ProxiedNode)
        return node.proxy

"""Requests of many inputs mean the same on every plane."""

from contextlib import AbstractAsyncContextManager

from loopback import test_compatible_plane as compatible
from loopback import test_memory_plane as memory
from loopback import test_native_plane as native
from stator.testing.conversation_suite import ConversationSuite
from stator.testing.plane_suite import PlanePair


class TestMemoryConversations(ConversationSuite):
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return memory.TestMemoryPlane().pair()


class TestNativeTcpConversations(ConversationSuite):
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return native.TestNativeTcp().pair()


class TestNativeUnixConversations(ConversationSuite):
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return native.TestNativeUnix().pair()


class TestCompatibleConversations(ConversationSuite):
    max_buffered = 20_000  # the kernel's buffers on loopback

    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return compatible.TestCompatiblePlane().pair()


class TestCompatibleMsgpackConversations(TestCompatibleConversations):
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return compatible.TestCompatiblePlaneMsgpack().pair()

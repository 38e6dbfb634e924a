"""The policy server: a saved policy answers robots over a websocket, in the protocol of openpi's client.

In come observations under the client's keys; out go action chunks with their timing, or a text that says what was wrong.
Start reading at ``startup.py``; ``server.py`` has the connections, ``requests.py`` the keys, ``batching.py`` the policy.
"""

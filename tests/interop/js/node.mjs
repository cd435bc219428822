// A js-libp2p node that a test drives: commands come as JSON lines on stdin, answers and events go to stdout.
//
// The first line says what to start: {seed, listen, announce, security, serves_dht, relays}. A command is {id, call, args}; its
// answer {id, result} or {id, error}. Events are {event, ...}. Bytes travel as hex. Ends with its stdin.

import { createInterface } from 'node:readline'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { dcutr } from '@libp2p/dcutr'
import { gossipsub } from '@libp2p/gossipsub'
import { identify, identifyPush } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { tls } from '@libp2p/tls'
import { lpStream } from '@libp2p/utils'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import * as Digest from 'multiformats/hashes/digest'

const RAW_CODEC = 0x55
const FRAME_BYTES_MAX = 2 * 1024 * 1024
const ENCRYPTERS = { noise: noise(), tls: tls() }

const hex = bytes => Buffer.from(bytes).toString('hex')
const bytes = text => new Uint8Array(Buffer.from(text, 'hex'))
const say = line => process.stdout.write(JSON.stringify(line) + '\n')
const cidOf = key => CID.createV1(RAW_CODEC, Digest.decode(bytes(key)))

async function start ({ seed, listen, announce, security, serves_dht: servesDht, relays }) {
  const services = {
    identify: identify(),
    identifyPush: identifyPush(),
    // The DHT pings, too, and one stream is the default.
    ping: ping({ maxOutboundStreams: 8 }),
    // Addresses on loopback count here, and the routing table takes a peer when it has identified itself.
    dht: kadDHT({ protocol: '/ipfs/kad/1.0.0', clientMode: !servesDht, peerInfoMapper: passthroughMapper }),
    pubsub: gossipsub({ emitSelf: false, allowPublishToZeroTopicPeers: true })
  }
  if (relays) {
    services.relay = circuitRelayServer()
  } else {
    services.dcutr = dcutr()
  }
  const node = await createLibp2p({
    privateKey: await generateKeyPairFromSeed('Ed25519', bytes(seed)),
    addresses: { listen, appendAnnounce: announce },
    transports: [tcp(), circuitRelayTransport()],
    connectionEncrypters: security.map(name => ENCRYPTERS[name]),
    streamMuxers: [yamux()],
    connectionGater: { denyDialMultiaddr: async () => false },
    services
  })
  node.addEventListener('peer:connect', event => say({ event: 'connected', peer: event.detail.toString() }))
  node.addEventListener('peer:disconnect', event => say({ event: 'lost', peer: event.detail.toString() }))
  node.addEventListener('peer:identify', event => say({
    event: 'identified',
    peer: event.detail.peerId.toString(),
    agent: event.detail.agentVersion,
    protocol: event.detail.protocolVersion,
    protocols: event.detail.protocols,
    addresses: event.detail.listenAddrs.map(String),
    signed: event.detail.signedPeerRecord != null,
    observed: event.detail.observedAddr?.toString()
  }))
  node.services.pubsub.addEventListener('message', event => say({
    event: 'gossip',
    topic: event.detail.topic,
    source: event.detail.type === 'signed' ? event.detail.from.toString() : null,
    data: hex(event.detail.data)
  }))
  return node
}

function describe (connection) {
  return {
    peer: connection.remotePeer.toString(),
    address: connection.remoteAddr.toString(),
    direction: connection.direction,
    encryption: connection.encryption,
    multiplexer: connection.multiplexer,
    limited: connection.limits != null
  }
}

async function collect (query, take) {
  const taken = []
  for await (const event of query) {
    taken.push(...take(event))
  }
  return taken
}

const withAddresses = ({ id, multiaddrs }) => ({ peer: id.toString(), addresses: multiaddrs.map(String) })

const calls = {
  addresses: async node => node.getMultiaddrs().map(String),
  dial: async (node, address) => describe(await node.dial(multiaddr(address))),
  leave: async node => { await node.stop() },
  connections: async (node, peer) => node.getConnections(peerIdFromString(peer)).map(describe),
  ping: async (node, peer) => node.services.ping.ping(peerIdFromString(peer)),
  listen: async (node, address) => { await node.components.transportManager.listen([multiaddr(address)]) },
  known: async (node, peer) => {
    const { protocols, addresses } = await node.peerStore.get(peerIdFromString(peer))
    return { protocols, addresses: addresses.map(one => one.multiaddr.toString()) }
  },

  serve: async (node, protocol) => {
    await node.handle(protocol, async stream => {
      const frames = lpStream(stream, { maxDataLength: FRAME_BYTES_MAX })
      try {
        while (true) {
          const question = await frames.read()
          await frames.write(new Uint8Array([0, ...question.subarray()]))
        }
      } catch {
        stream.abort(new Error('the stream ended'))
      }
    }, { runOnLimitedConnection: true })
  },
  ask: async (node, peer, protocol, question) => {
    // dialProtocol dials again where there is a relayed connection only, joins such a dial of the DHT's, and fails when
    // that one drops what it got for a duplicate.
    const id = peerIdFromString(peer)
    const options = { runOnLimitedConnection: true }
    const open = node.getConnections(id).find(one => one.status === 'open')
    const stream = await (open?.newStream(protocol, options) ?? node.dialProtocol(id, protocol, options))
    const frames = lpStream(stream, { maxDataLength: FRAME_BYTES_MAX })
    await frames.write(bytes(question))
    const answer = await frames.read()
    await stream.close()
    return hex(answer.subarray())
  },

  routingTableSize: async node => node.services.dht.routingTable.size,
  provide: async (node, key) => collect(node.services.dht.provide(cidOf(key)), event =>
    event.name === 'PEER_RESPONSE' && event.messageName === 'ADD_PROVIDER' ? [event.from.toString()] : []),
  findProviders: async (node, key) => collect(node.services.dht.findProviders(cidOf(key)), event =>
    event.name === 'PROVIDER' ? event.providers.map(withAddresses) : []),
  findPeer: async (node, peer) => {
    const found = await node.peerRouting.findPeer(peerIdFromString(peer), { useCache: false })
    return withAddresses(found)
  },
  closestPeers: async (node, key) => collect(node.services.dht.getClosestPeers(bytes(key)), event =>
    event.name === 'FINAL_PEER' ? [event.peer.id.toString()] : []),
  put: async (node, key, value) => collect(node.services.dht.put(bytes(key), bytes(value)), event =>
    event.name === 'PEER_RESPONSE' && event.messageName === 'PUT_VALUE' ? [event.from.toString()] : []),
  get: async (node, key) => collect(node.services.dht.get(bytes(key)), event =>
    event.name === 'VALUE' ? [{ value: hex(event.value), from: event.from?.toString() ?? null }] : []),
  publicKey: async node => hex((await import('@libp2p/crypto/keys')).publicKeyToProtobuf(
    node.components.privateKey.publicKey)),

  subscribe: async (node, topic) => { node.services.pubsub.subscribe(topic) },
  subscribers: async (node, topic) => node.services.pubsub.getSubscribers(topic).map(String),
  mesh: async (node, topic) => node.services.pubsub.getMeshPeers(topic),
  publish: async (node, topic, data) =>
    (await node.services.pubsub.publish(topic, bytes(data))).recipients.map(String)
}

let node
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  if (node == null) {
    node = await start(command)
    say({ event: 'started', peer: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) })
    continue
  }
  calls[command.call](node, ...command.args).then(
    result => say({ id: command.id, result: result ?? null }),
    error => say({ id: command.id, error: `${error.name}: ${error.message}` })
  )
}
process.exit(0)

// Package usernet is the network of one guest, in this process: no device, no
// route and no privilege of the host is needed for it, and nothing is reached
// but what a rule allows.
//
//	guest ── Ethernet ── QEMU ── frames ── packet.go   what is no plain packet ends
//	                                          │        here; ARP, neighbours, refused UDP
//	                                          ├── dns.go      names, by the host's resolver
//	                                          └── forward.go  TCP: rule, then a connection
//	                                                          of the host's (egress)
//
// The guest has one neighbour, the gateway, which answers for all addresses. A
// TCP connection is looked at before it is accepted: its port and the address
// that is to be reached, when it is connected to (package egress). Then the host
// connects, and only then the guest is told that it is connected. What is
// refused is reset at once, so that nothing hangs, and the refusal is kept for
// whoever reads the build's notes.
//
// The gateway's own address stands for the host's loopback: 192.0.0.1:8080 in the
// guest is 127.0.0.1:8080 of the host, and is reached only if that is listed.
// It has a name, HostName.
//
// # Hostile guests
//
// The guest may have taken over its kernel, and QEMU. Frames that are not plain
// ARP, IPv4 or IPv6 of the guest's own addresses (no options, no fragments, no
// other sender) go no further than packet.go; gVisor's TCP sees what is left. A
// guest that sends faster than it may is not read from: it waits, and nobody
// else does. Connections, bytes waiting in each, lookups under way, and what
// is kept for the record are bounded. A guest that does not read fills its own
// buffers only.
package usernet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"nbd/vm/egress"
	"nbd/vm/link"
)

// The addresses of the link. They are of ranges that never lead anywhere: the
// IPv4 ones are for links like this (RFC 7335), the IPv6 ones are local.
var (
	gateway4 = netip.MustParseAddr("192.0.0.1")
	guest4   = netip.MustParseAddr("192.0.0.2")
	gateway6 = netip.MustParseAddr("fd6e:6264::1")
	guest6   = netip.MustParseAddr("fd6e:6264::2")

	gatewayMAC = [6]byte{0x02, 'n', 'b', 'd', 0, 1}
	guestMAC   = [6]byte{0x02, 'n', 'b', 'd', 0, 2}
)

// MAC is the address that the guest's device must have; other senders are not
// heard.
var MAC = net.HardwareAddr(guestMAC[:]).String()

// MTU is the largest IP packet on the link, in bytes. It is large because each
// packet costs an emulated guest much; larger ones would need blocks of memory
// that a busy guest may lack.
const MTU = 16 << 10

// What one guest may have at once.
const (
	maxConnections = 128
	maxDialing     = 64        // of them in their handshake
	bufferSize     = 128 << 10 // of one connection and direction, in bytes
	maxQueued      = 128       // packets that wait for the guest
	dialsASecond   = 100
	dialBurst      = 256
	framesASecond  = 20_000 // from the guest
)

// Config says what a guest may reach.
type Config struct {
	// Rule is which addresses may be reached, beside public ones.
	Rule egress.Rule
	// Ports are the TCP ports that may be reached on public addresses. What the
	// rule lists may be reached on all ports.
	Ports []uint16
	// Rate bounds the bytes a second of each direction; zero is no bound.
	Rate int64
	// MaxBytes bounds the bytes of both directions; zero is no bound.
	MaxBytes int64

	// lookup resolves a name; nil asks the host's resolver.
	lookup func(ctx context.Context, name string) ([]netip.Addr, error)
	// ipv6 says whether the host reaches IPv6 addresses; nil finds out.
	ipv6 *bool
}

// A Network is the network of one guest. Its methods are safe for concurrent
// use.
type Network struct {
	cfg  Config
	ipv6 bool
	link net.Conn
	ep   *channel.Endpoint
	tcp  *stack.Stack
	use  *use
	dns  *resolver

	up, down *rate.Limiter // bytes of connections
	frames   *rate.Limiter
	dials    *rate.Limiter

	ctx    context.Context
	cancel context.CancelFunc
	// replies are frames that we made, and wait for the guest.
	replies chan []byte
	slots   chan struct{} // one for each connection

	sending sync.Mutex // guards link's writing half

	mu      sync.Mutex // guards closed and work.Add
	closed  bool
	work    sync.WaitGroup
	closing sync.Once
}

// New returns a network that has a guest on conn, which carries frames as
// QEMU's stream device does: the length in four bytes, big endian, then the
// frame. It owns conn until Close.
func New(cfg Config, conn net.Conn) (*Network, error) {
	n := &Network{cfg: cfg, link: conn, use: newUse(cfg.MaxBytes), replies: make(chan []byte, maxQueued),
		slots: make(chan struct{}, maxConnections), frames: rate.NewLimiter(framesASecond, framesASecond/10),
		dials: rate.NewLimiter(dialsASecond, dialBurst), up: limiter(cfg.Rate), down: limiter(cfg.Rate)}
	if cfg.ipv6 != nil {
		n.ipv6 = *cfg.ipv6
	} else {
		n.ipv6 = hostHasIPv6()
	}
	n.dns = newResolver(cfg, n.ipv6, n.use)
	n.ctx, n.cancel = context.WithCancel(context.Background())
	if err := n.startTCP(); err != nil {
		n.cancel()
		return nil, errors.Join(fmt.Errorf("start network: %w", err), conn.Close())
	}
	n.work.Go(n.read)
	n.work.Go(n.writePackets)
	n.work.Go(n.writeReplies)
	return n, nil
}

// limiter bounds bytes a second; the burst has room for one read.
func limiter(bytesASecond int64) *rate.Limiter {
	if bytesASecond <= 0 {
		return rate.NewLimiter(rate.Inf, 0)
	}
	return rate.NewLimiter(rate.Limit(bytesASecond), int(max(bytesASecond/10, copyBuffer)))
}

// startTCP makes a stack that takes connections to all addresses.
func (n *Network) startTCP() error {
	n.tcp = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	n.ep = channel.New(maxQueued, MTU, "")
	const nic = 1
	recv := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: bufferSize, Max: bufferSize}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: bufferSize, Max: bufferSize}
	moderate := tcpip.TCPModerateReceiveBufferOption(false)
	sack := tcpip.TCPSACKEnabled(true)
	// The link loses and reorders nothing, so that nothing of a connection
	// comes late.
	wait := tcpip.TCPTimeWaitTimeoutOption(time.Second)
	for _, err := range []tcpip.Error{
		n.tcp.CreateNIC(nic, n.ep),
		n.tcp.SetPromiscuousMode(nic, true), // packets for all addresses are ours
		n.tcp.SetSpoofing(nic, true),        // and answered from these
		n.tcp.SetTransportProtocolOption(tcp.ProtocolNumber, &recv),
		n.tcp.SetTransportProtocolOption(tcp.ProtocolNumber, &send),
		n.tcp.SetTransportProtocolOption(tcp.ProtocolNumber, &moderate),
		n.tcp.SetTransportProtocolOption(tcp.ProtocolNumber, &sack),
		n.tcp.SetTransportProtocolOption(tcp.ProtocolNumber, &wait),
	} {
		if err != nil {
			return errors.New(err.String())
		}
	}
	all4, _ := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{}), tcpip.MaskFromBytes(make([]byte, 4)))
	all6, _ := tcpip.NewSubnet(tcpip.AddrFrom16([16]byte{}), tcpip.MaskFromBytes(make([]byte, 16)))
	n.tcp.SetRouteTable([]tcpip.Route{{Destination: all4, NIC: nic}, {Destination: all6, NIC: nic}})
	f := tcp.NewForwarder(n.tcp, bufferSize, maxDialing, n.forward)
	n.tcp.SetTransportProtocolHandler(tcp.ProtocolNumber, f.HandlePacket)
	return nil
}

// hostHasIPv6 reports whether the host has a route to public IPv6 addresses. It
// sends nothing.
func hostHasIPv6() bool {
	c, err := net.Dial("udp6", "[2000::1]:53")
	if err != nil {
		return false
	}
	defer c.Close()
	from, err := netip.ParseAddrPort(c.LocalAddr().String())
	return err == nil && egress.Special(from.Addr()) == ""
}

// Guest is what the guest has to know.
func (n *Network) Guest() *link.Network {
	g := &link.Network{MAC: MAC, MTU: MTU, Nameserver: gateway4.String(),
		Addresses: []string{guest4.String() + "/29"}, Gateways: []string{gateway4.String()}}
	if n.ipv6 {
		g.Addresses = append(g.Addresses, guest6.String()+"/64")
		g.Gateways = append(g.Gateways, gateway6.String())
	}
	return g
}

// Use tells what the guest has done so far.
func (n *Network) Use() Use { return n.use.get() }

// Close ends all connections and waits for everything that belongs to the
// network.
func (n *Network) Close() error {
	var err error
	n.closing.Do(func() {
		n.mu.Lock()
		n.closed = true
		n.mu.Unlock()
		n.cancel()
		err = n.link.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			n.work.Wait()
			n.ep.Close()
			n.tcp.Close()
			n.tcp.Wait()
		}()
		err = errors.Join(err, n.resetUntil(done))
	})
	return err
}

// closePatience is how long a network may take to end. Nothing in it waits for
// the guest or another host then.
const closePatience = 20 * time.Second

// resetUntil resets all connections until done: one may just have begun, which
// would wait for the guest.
func (n *Network) resetUntil(done <-chan struct{}) error {
	late := time.After(closePatience)
	for {
		for _, e := range slices.Concat(n.tcp.RegisteredEndpoints(), n.tcp.CleanupEndpoints()) {
			e.Abort()
		}
		select {
		case <-done:
			return nil
		case <-late:
			return errors.New("the network of a guest does not end")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// begin counts something that Close waits for; false if it is too late.
func (n *Network) begin() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.work.Add(1)
	return true
}

// maxFrame is the longest frame that a link carries.
const maxFrame = etherHeader + MTU

// read takes the guest's frames until the link ends.
func (n *Network) read() {
	defer n.cancel() // a network without a guest is of no use
	var head [4]byte
	buf := make([]byte, maxFrame)
	for {
		if _, err := io.ReadFull(n.link, head[:]); err != nil {
			return
		}
		size := binary.BigEndian.Uint32(head[:])
		if size > maxFrame {
			return // QEMU sends none: whoever did has taken it over
		}
		if _, err := io.ReadFull(n.link, buf[:size]); err != nil {
			return
		}
		if n.frames.Wait(n.ctx) != nil {
			return
		}
		n.receive(buf[:size])
	}
}

// writePackets sends what the TCP stack has for the guest.
func (n *Network) writePackets() {
	buf := make([]byte, 0, 4+maxFrame)
	for {
		pkt := n.ep.ReadContext(n.ctx)
		if pkt == nil {
			return
		}
		etherType := uint16(etherIPv4)
		if pkt.NetworkProtocolNumber == ipv6.ProtocolNumber {
			etherType = etherIPv6
		}
		buf = appendEther(append(buf[:0], 0, 0, 0, 0), etherType)
		for _, s := range pkt.AsSlices() {
			buf = append(buf, s...)
		}
		pkt.DecRef()
		if n.send(buf) != nil {
			n.cancel()
			return
		}
	}
}

// writeReplies sends what we made ourselves.
func (n *Network) writeReplies() {
	for {
		select {
		case frame := <-n.replies:
			if n.send(slices.Concat([]byte{0, 0, 0, 0}, frame)) != nil {
				n.cancel()
				return
			}
		case <-n.ctx.Done():
			return
		}
	}
}

// send writes one frame, which begins after four bytes for its length.
func (n *Network) send(buf []byte) error {
	binary.BigEndian.PutUint32(buf, uint32(len(buf)-4))
	n.sending.Lock()
	defer n.sending.Unlock()
	_, err := n.link.Write(buf)
	return err
}

// reply queues a frame for the guest; a guest that does not read loses it.
func (n *Network) reply(frame []byte) {
	if frame == nil {
		return
	}
	select {
	case n.replies <- frame:
	default:
	}
}

package usernet

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"nbd/vm/egress"
)

// A testGuest is a well-behaved guest: a TCP/IP stack on the other end of the
// link. It knows the gateway's MAC address.
type testGuest struct {
	t     *testing.T
	net   *Network
	link  net.Conn
	stack *stack.Stack
	ep    *channel.Endpoint
}

// linked returns a network and the guest's end of its link.
func linked(t *testing.T, cfg Config) (*Network, net.Conn) {
	t.Helper()
	if cfg.ipv6 == nil {
		cfg.ipv6 = new(bool)
	}
	ours, theirs := net.Pipe()
	n, err := New(cfg, ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		theirs.Close()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n, theirs
}

func newGuest(t *testing.T, cfg Config) *testGuest {
	t.Helper()
	n, conn := linked(t, cfg)
	g := &testGuest{t: t, net: n, link: conn}
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	g.ep = channel.New(256, MTU, "")
	if err := g.stack.CreateNIC(1, g.ep); err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{guest4, guest6} {
		proto := tcpip.NetworkProtocolNumber(ipv4.ProtocolNumber)
		if a.Is6() {
			proto = ipv6.ProtocolNumber
		}
		addr := tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}
		if err := g.stack.AddProtocolAddress(1, addr, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	all4, _ := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{}), tcpip.MaskFromBytes(make([]byte, 4)))
	all6, _ := tcpip.NewSubnet(tcpip.AddrFrom16([16]byte{}), tcpip.MaskFromBytes(make([]byte, 16)))
	g.stack.SetRouteTable([]tcpip.Route{{Destination: all4, NIC: 1}, {Destination: all6, NIC: 1}})
	ctx, cancel := context.WithCancel(context.Background())
	go g.send(ctx)
	go g.receive()
	t.Cleanup(func() { cancel(); g.stack.Close() })
	return g
}

func (g *testGuest) send(ctx context.Context) {
	for pkt := g.ep.ReadContext(ctx); pkt != nil; pkt = g.ep.ReadContext(ctx) {
		etherType := uint16(etherIPv4)
		if pkt.NetworkProtocolNumber == ipv6.ProtocolNumber {
			etherType = etherIPv6
		}
		err := writeFrame(g.link, etherType, pkt.ToView().AsSlice())
		pkt.DecRef()
		if err != nil {
			return
		}
	}
}

// writeFrame sends one frame of the guest.
func writeFrame(w io.Writer, etherType uint16, data []byte) error {
	f := append(append([]byte{}, gatewayMAC[:]...), guestMAC[:]...)
	f = append(binary.BigEndian.AppendUint16(f, etherType), data...)
	return writeRaw(w, f)
}

func writeRaw(w io.Writer, frame []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...))
	return err
}

// readFrame returns the next frame to the guest.
func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	frame := make([]byte, binary.BigEndian.Uint32(head[:]))
	_, err := io.ReadFull(r, frame)
	return frame, err
}

func (g *testGuest) receive() {
	for {
		f, err := readFrame(g.link)
		if err != nil {
			return
		}
		proto := tcpip.NetworkProtocolNumber(binary.BigEndian.Uint16(f[12:]))
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(f[etherHeader:])})
		g.ep.InjectInbound(proto, pkt)
		pkt.DecRef()
	}
}

// dial connects to an address.
func (g *testGuest) dial(to netip.AddrPort) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	proto := tcpip.NetworkProtocolNumber(ipv4.ProtocolNumber)
	if to.Addr().Is6() {
		proto = ipv6.ProtocolNumber
	}
	return gonet.DialContextTCP(ctx, g.stack, fullAddress(to), proto)
}

func fullAddress(to netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()), Port: to.Port()}
}

// server takes connections on the host's loopback, and gives each to serve.
func server(t *testing.T, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}

// echo sends back what it gets, and ends when that ends.
func echo(c *net.TCPConn) {
	if _, err := io.Copy(c, c); err == nil {
		_ = c.CloseWrite()
	}
}

func rule(t *testing.T, list ...string) egress.Rule {
	t.Helper()
	r, err := egress.ParseRule(list)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// isReset reports that a connection was refused and did not just take long.
func isReset(err error) bool {
	return err != nil && !errors.Is(err, context.DeadlineExceeded)
}

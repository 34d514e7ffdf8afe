package usernet

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// gatewayPort is what a guest calls a port of the host's loopback.
func gatewayPort(at netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(gateway4, at.Port()) }

func TestForward(t *testing.T) {
	at := server(t, echo)
	g := newGuest(t, Config{Rule: rule(t, at.String())})
	c, err := g.dial(gatewayPort(at))
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<15) // more than all buffers hold
	go func() {
		_, _ = c.Write(data) // what arrives is looked at
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes of %d came back: %v", len(got), len(data), err)
	}
	u := g.net.Use()
	if u.Sent != int64(len(data)) || u.Received != int64(len(data)) || !u.Private || len(u.Hosts) != 1 || len(u.Refusals) != 0 {
		t.Errorf("use is %+v", u)
	}
}

// What is not public is refused at once, and told.
func TestForwardRefuses(t *testing.T) {
	at := server(t, func(c *net.TCPConn) { t.Error("a connection came") })
	g := newGuest(t, Config{Ports: []uint16{at.Port(), 80}})
	for _, to := range []string{gatewayPort(at).String(), "10.0.0.1:80", "169.254.169.254:80", "192.168.1.1:80", "100.64.0.1:80", "8.8.8.8:81", "192.0.0.3:80"} {
		if _, err := g.dial(netip.MustParseAddrPort(to)); !isReset(err) {
			t.Errorf("%s: %v", to, err)
		}
	}
	u := g.net.Use()
	if len(u.Refusals) != 7 || len(u.Hosts) != 0 || u.Private {
		t.Errorf("use is %+v", u)
	}
	for i, want := range []string{"loopback", "private", "link-local", "private", "carrier", "port 81", "special"} {
		if !strings.Contains(u.Refusals[i].String(), want) {
			t.Errorf("%s: want %s", u.Refusals[i], want)
		}
	}
}

// The same over IPv6.
func TestForwardIPv6(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Fatalf("this machine's loopback lacks IPv6: %v", err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			echo(c.(*net.TCPConn))
			c.Close()
		}
	}()
	at := netip.MustParseAddrPort(l.Addr().String())
	g := newGuest(t, Config{Rule: rule(t, at.String()), ipv6: new(true), Ports: []uint16{80}})
	c, err := g.dial(netip.AddrPortFrom(gateway6, at.Port()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
		t.Errorf("%q came back: %v", got, err)
	}
	for _, to := range []string{"[fd00::1]:80", "[fe80::1]:80", "[64:ff9b::a00:1]:80", "[2002:7f00:1::]:80"} {
		if _, err := g.dial(netip.MustParseAddrPort(to)); !isReset(err) {
			t.Errorf("%s: %v", to, err)
		}
	}
	if u := g.net.Use(); len(u.Refusals) != 4 {
		t.Errorf("use is %+v", u)
	}
}

// A host that refuses is told as it is, and not as a refusal of ours.
func TestForwardToClosedPort(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(l.Addr().String())
	l.Close()
	g := newGuest(t, Config{Rule: rule(t, at.String())})
	if _, err := g.dial(gatewayPort(at)); !isReset(err) {
		t.Error(err)
	}
	if u := g.net.Use(); len(u.Refusals) != 0 || len(u.Hosts) != 0 {
		t.Errorf("use is %+v", u)
	}
}

// A connection that breaks off on the host's side does not look complete.
func TestForwardReset(t *testing.T) {
	at := server(t, func(c *net.TCPConn) {
		_, _ = c.Write([]byte("half"))
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	g := newGuest(t, Config{Rule: rule(t, at.String())})
	c, err := g.dial(gatewayPort(at))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err == nil {
		t.Errorf("it ends well, with %q", got)
	}
}

// Past its bytes a guest is cut off, and connected no more.
func TestForwardBytes(t *testing.T) {
	at := server(t, func(c *net.TCPConn) { _, _ = c.Write(make([]byte, 1<<20)) })
	g := newGuest(t, Config{Rule: rule(t, at.String()), MaxBytes: 100_000})
	c, err := g.dial(gatewayPort(at))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err == nil || len(got) > 100_000 {
		t.Errorf("%d bytes came, and %v", len(got), err)
	}
	if _, err := g.dial(gatewayPort(at)); !isReset(err) {
		t.Errorf("afterwards: %v", err)
	}
	u := g.net.Use()
	if u.Received > 100_000+copyBuffer || len(u.Refusals) != 1 || !strings.Contains(u.Refusals[0].String(), "as much as it may") {
		t.Errorf("use is %+v", u)
	}
}

// A guest has so many connections and no more, until it ends one.
func TestForwardConnections(t *testing.T) {
	at := server(t, echo)
	g := newGuest(t, Config{Rule: rule(t, at.String())})
	var conns []net.Conn
	for range maxConnections {
		c, err := g.dial(gatewayPort(at))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	if _, err := g.dial(gatewayPort(at)); !isReset(err) {
		t.Errorf("one more: %v", err)
	}
	if u := g.net.Use(); len(u.Refusals) != 1 || len(u.Hosts) != 1 {
		t.Errorf("use is %+v", u)
	}
	c := conns[0].(interface{ CloseWrite() error })
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conns[0]); err != nil {
		t.Fatal(err)
	}
	conns[0].Close()
	g.net.slots <- struct{}{} // there is room again
	<-g.net.slots
	if _, err := g.dial(gatewayPort(at)); err != nil {
		t.Errorf("after one ended: %v", err)
	}
}

// A guest that does not read holds up its host's connection, and fills nothing
// but its own buffers.
func TestForwardSlowReader(t *testing.T) {
	written := make(chan int, 1)
	at := server(t, func(c *net.TCPConn) {
		n, _ := c.Write(make([]byte, 256<<20)) // until the network ends
		written <- n
	})
	g := newGuest(t, Config{Rule: rule(t, at.String())})
	if _, err := g.dial(gatewayPort(at)); err != nil {
		t.Fatal(err)
	}
	for before := int64(0); before < bufferSize || g.net.Use().Received > before; time.Sleep(20 * time.Millisecond) {
		before = g.net.Use().Received
	}
	if err := g.net.Close(); err != nil {
		t.Error(err)
	}
	if n, u := <-written, g.net.Use(); u.Received > 16<<20 {
		t.Errorf("the host sent %d bytes, of which %d were taken", n, u.Received)
	}
}

// A flood of requests for connections, from a guest that reads nothing, ends
// with its network.
func TestForwardFlood(t *testing.T) {
	n, conn := linked(t, Config{Ports: []uint16{80}})
	go discard(conn)
	for i := range 5000 {
		if err := writeFrame(conn, etherIPv4, synFrom(guest4, netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), uint16(1024+i), 80)); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if u := n.Use(); len(u.Refusals) > maxRefusals || len(u.Hosts) > 0 {
		t.Errorf("use is %+v", u)
	}
}

// Each refusal says what was refused, also without a port or room for the host.
func TestRefusals(t *testing.T) {
	u := newUse(10)
	u.refuse(netip.AddrPortFrom(public, 0), "", "no port")
	u.refuse(netip.AddrPort{}, "x.example", "no address")
	for i := range maxHosts + 1 {
		h := u.host("many.example", netip.AddrPortFrom(public, uint16(1+i)))
		if i == maxHosts && h.received(11) == nil {
			t.Error("there is no end")
		}
	}
	u.refuse(netip.AddrPortFrom(public, maxHosts+1), "many.example", errTooMuch.Error())
	var got []string
	for _, r := range u.get().Refusals {
		got = append(got, r.String())
	}
	want := []string{"8.8.8.8:0: no port", "x.example: no address", "many.example (8.8.8.8:101): " + errTooMuch.Error()}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// The record of a guest that connects to ever more is bounded.
func TestUseIsBounded(t *testing.T) {
	u := newUse(0)
	for i := range 3 * maxHosts {
		to := netip.AddrPortFrom(public, uint16(i))
		if err := u.host("", to).received(1); err != nil {
			t.Fatal(err)
		}
		u.refuse(to, "", "no")
		u.refuse(to, "", "no")
	}
	got := u.get()
	if len(got.Hosts) != maxHosts || got.MoreHosts != 2*maxHosts || len(got.Refusals) != maxRefusals || got.Received != 3*maxHosts {
		t.Errorf("%d hosts and %d more, %d refusals, %d bytes", len(got.Hosts), got.MoreHosts, len(got.Refusals), got.Received)
	}
}

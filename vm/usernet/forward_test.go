package usernet

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
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

package usernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"nbd/vm/egress"
)

const (
	// dialPatience is how long a host may take to answer a connection.
	dialPatience = 30 * time.Second
	// copyBuffer is how much one read of a connection takes, in bytes.
	copyBuffer = 32 << 10
)

// errTooMuch ends a connection when the guest has used up its bytes.
var errTooMuch = errors.New("the build has sent and received as much as it may")

// forward connects the guest to what it wants, or refuses that.
func (n *Network) forward(r *tcp.ForwarderRequest) {
	if !n.begin() {
		r.Complete(true)
		return
	}
	defer n.work.Done()
	select {
	case n.slots <- struct{}{}:
		defer func() { <-n.slots }()
	default:
		n.use.refuse(addrPort(r), "", fmt.Sprintf("the build has %d connections, and may have no more", maxConnections))
		r.Complete(true)
		return
	}
	if n.dials.Wait(n.ctx) != nil {
		r.Complete(true)
		return
	}
	to := addrPort(r)
	host, name, err := n.connect(to)
	if err != nil {
		r.Complete(true)
		return
	}
	defer host.Close()
	used := n.use.host(name, to)
	var events waiter.Queue
	ep, failed := r.CreateEndpoint(&events)
	r.Complete(failed != nil)
	if failed != nil {
		return // the guest is gone already
	}
	guest := &guestConn{gonet.NewTCPConn(&events, ep), ep}
	defer guest.Close()
	stop := context.AfterFunc(n.ctx, func() {
		ep.Abort()
		host.Close() // it is closed again
	})
	defer stop()
	n.relay(guest, host, used)
}

// addrPort is where the guest wants to connect to.
func addrPort(r *tcp.ForwarderRequest) netip.AddrPort {
	id := r.ID()
	a, _ := netip.AddrFromSlice(id.LocalAddress.AsSlice())
	return netip.AddrPortFrom(a, id.LocalPort)
}

// connect connects the host to what the guest wants. The name is that by which
// the guest found the address, "" if it did not ask.
func (n *Network) connect(to netip.AddrPort) (conn *net.TCPConn, name string, err error) {
	target := onHost(to)
	name = n.dns.nameOf(to.Addr(), func(name string) bool { return n.allowed(name, target) == nil })
	if err := n.allowed(name, target); err != nil {
		n.use.refuse(to, name, reason(err))
		return nil, name, err
	}
	if n.use.spent() {
		n.use.refuse(to, name, errTooMuch.Error())
		return nil, name, errTooMuch
	}
	// The dialer checks the address once more, when it connects.
	d := n.cfg.Rule.Dialer(name)
	d.Timeout = dialPatience
	c, err := d.DialContext(n.ctx, "tcp", target.String())
	if err != nil {
		return nil, name, err
	}
	if (egress.Rule{}).Check("", target) != nil {
		n.use.private()
	}
	return c.(*net.TCPConn), name, nil
}

var loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// onHost turns the gateway's address into what it stands for.
func onHost(to netip.AddrPort) netip.AddrPort {
	switch to.Addr() {
	case gateway4:
		return netip.AddrPortFrom(loopback4, to.Port())
	case gateway6:
		return netip.AddrPortFrom(netip.IPv6Loopback(), to.Port())
	}
	return to
}

// A portError says that a port is not reached.
type portError struct {
	port uint16
	open []uint16
}

func (e *portError) Error() string {
	return fmt.Sprintf("port %d is not one that builds may reach: these are %s", e.port, strings.Trim(fmt.Sprint(e.open), "[]"))
}

// allowed says why the guest may not connect to an address, or nil.
func (n *Network) allowed(name string, to netip.AddrPort) error {
	if err := n.cfg.Rule.Check(name, to); err != nil {
		return err
	}
	if !slices.Contains(n.cfg.Ports, to.Port()) && !n.cfg.Rule.Lists(name, to) {
		return &portError{to.Port(), n.cfg.Ports}
	}
	return nil
}

// reason says in a few words why something was refused.
func reason(err error) string {
	var refused *egress.RefusedError
	var port *portError
	switch {
	case errors.As(err, &refused):
		return fmt.Sprintf("%s is not reached: it is %s", refused.Addr, refused.Why)
	case errors.As(err, &port):
		return port.Error()
	}
	return "it could not be checked"
}

// A guestConn is the guest's side of a connection.
type guestConn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

// abort resets the connection, so that what was sent does not look complete.
func (c *guestConn) abort() { c.ep.Abort() }

// relay copies both ways until both sides have ended, or one breaks off.
func (n *Network) relay(guest *guestConn, host *net.TCPConn, h *hostUse) {
	broken := func() {
		guest.abort()
		_ = host.SetLinger(0) // a reset; an error says that it is over already
		_ = host.Close()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if n.copy(host, guest, n.up, h.sent) != nil {
			broken()
			return
		}
		_ = host.CloseWrite() // an error is told to who reads from it, too
	}()
	if n.copy(guest, host, n.down, h.received) != nil {
		broken()
	} else {
		_ = guest.CloseWrite() // an error says that the guest has closed it
	}
	<-done
}

// copy copies as fast as the limiter allows, until from ends. count takes each
// number of bytes and says whether more may follow.
func (n *Network) copy(to io.Writer, from io.Reader, limit *rate.Limiter, count func(int) error) error {
	buf := make([]byte, copyBuffer)
	for {
		size, err := from.Read(buf)
		if size > 0 {
			if err := count(size); err != nil {
				return err
			}
			if limit.Limit() != rate.Inf {
				if err := limit.WaitN(n.ctx, size); err != nil {
					return err
				}
			}
			if _, err := to.Write(buf[:size]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

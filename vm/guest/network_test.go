package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"nbd/vm/egress"
	"nbd/vm/link"
	"nbd/vm/usernet"
)

var testNetwork = &link.Network{MTU: 16384, Nameserver: "192.0.0.1",
	Addresses: []string{"192.0.0.2/29", "fd6e:6264::2/64"}, Gateways: []string{"192.0.0.1"}}

// A device gets its addresses and routes in the network of the build, and not
// here. The loopback device is one that every network has; IPv6 has no routes by
// way of it.
func TestSetUpDevice(t *testing.T) {
	_, s := newLab(t).stage(t.TempDir())
	t.Cleanup(func() { s.end() }) // its status is that of a process that was killed
	var device *net.Interface
	var addrs []net.Addr
	var routes []byte
	err := inNetwork(s.cmd.Process.Pid, func() (err error) {
		if err := setUpDevice("lo", testNetwork); err != nil {
			return err
		}
		if device, err = net.InterfaceByName("lo"); err != nil {
			return err
		}
		if addrs, err = device.Addrs(); err != nil {
			return err
		}
		routes, err = os.ReadFile("/proc/thread-self/net/route")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(addrs); got != "[127.0.0.1/8 192.0.0.2/29 ::1/128 fd6e:6264::2/64]" && got != "[127.0.0.1/8 192.0.0.2/29 fd6e:6264::2/64 ::1/128]" || device.MTU != 16384 {
		t.Errorf("addresses %v, MTU %d", got, device.MTU)
	}
	if !strings.Contains(string(routes), "lo\t00000000\t010000C0\t") {
		t.Errorf("routes\n%s", routes)
	}
	here, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if mine, err := here.Addrs(); err != nil || strings.Contains(fmt.Sprint(mine), "192.0.0.2") {
		t.Errorf("addresses here are %v, %v", mine, err)
	}
}

// What the kernel refuses is told.
func TestSetUpDeviceFails(t *testing.T) {
	_, s := newLab(t).stage(t.TempDir())
	t.Cleanup(func() { s.end() }) // its status is that of a process that was killed
	for _, bad := range []*link.Network{
		{MTU: 16384, Addresses: []string{"192.0.0.2"}},
		{MTU: 16384, Gateways: []string{"10.1.1.1"}},
		{MTU: -1},
	} {
		if err := inNetwork(s.cmd.Process.Pid, func() error { return setUpDevice("lo", bad) }); err == nil {
			t.Errorf("%+v is set up", bad)
		}
	}
	if err := inNetwork(s.cmd.Process.Pid, func() error { return setUpDevice("eth9", testNetwork) }); err == nil {
		t.Error("a device that is not there is set up")
	}
	if err := inNetwork(1<<30, func() error { return nil }); err == nil {
		t.Error("the network of a process that is not there is entered")
	}
}

// Only with a network there are files for it.
func TestNetworkFiles(t *testing.T) {
	for _, n := range []*link.Network{nil, testNetwork} {
		s := &stage{dir: t.TempDir()}
		etc := filepath.Join(s.root(), "etc")
		if err := os.MkdirAll(etc, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := s.makeNetworkFiles(n); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"resolv.conf", "nsswitch.conf", "services"} {
			text, err := os.ReadFile(filepath.Join(etc, name))
			if os.IsNotExist(err) != (n == nil) || name == "resolv.conf" && n != nil && string(text) != "nameserver 192.0.0.1\n" {
				t.Errorf("%s: %q, %v", name, text, err)
			}
		}
	}
}

// newTAP returns the other end of a network device with the address that a
// guest's has.
func newTAP(t *testing.T, name string) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("this machine has no devices for the test (%v); the script of networks has a real guest's", err)
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		t.Fatal(err)
	}
	// Only now it can be waited for.
	tap := os.NewFile(uintptr(fd), "tap")
	t.Cleanup(func() { tap.Close() })
	device, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	mac, err := net.ParseMAC(usernet.MAC)
	if err != nil {
		t.Fatal(err)
	}
	m := newLinkRequest(device.Index, 0, 0)
	m.attribute(unix.IFLA_ADDRESS, mac)
	if err := m.do(unix.RTM_NEWLINK, 0); err != nil {
		t.Fatal(err)
	}
	return tap
}

// linkTo joins a device with a network, as QEMU does.
func linkTo(t *testing.T, tap *os.File, cfg usernet.Config) *usernet.Network {
	t.Helper()
	ours, theirs := net.Pipe()
	n, err := usernet.New(cfg, ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		theirs.Close()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	go func() {
		buf := make([]byte, 4+1<<16)
		for {
			size, err := tap.Read(buf[4:])
			if err != nil {
				return
			}
			binary.BigEndian.PutUint32(buf, uint32(size))
			if _, err := theirs.Write(buf[:4+size]); err != nil {
				return
			}
		}
	}()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			if _, err := io.ReadFull(theirs, buf[:4]); err != nil {
				return
			}
			frame := buf[:binary.BigEndian.Uint32(buf)]
			if _, err := io.ReadFull(theirs, frame); err != nil {
				return
			}
			if _, err := tap.Write(frame); err != nil {
				return
			}
		}
	}()
	return n
}

// A device is found, moved into the build's network, and set up there; then the
// kernel's own TCP reaches what the host lets it, and is refused at once where
// it does not.
func TestNetworkOfAKernel(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write(data)
			c.Close()
		}
	}()
	rule, err := egress.ParseRule([]string{l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	n := linkTo(t, newTAP(t, "nbdtest0"), usernet.Config{Rule: rule, Ports: []uint16{80}})
	name, ok, err := findDevice(usernet.MAC)
	if err != nil || !ok || name != "nbdtest0" {
		t.Fatalf("found %q, %v, %v", name, ok, err)
	}
	_, s := newLab(t).stage(t.TempDir())
	t.Cleanup(func() { s.end() }) // its status is that of a process that was killed
	pid := s.cmd.Process.Pid
	if err := moveDevice(name, pid); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := findDevice(usernet.MAC); ok || err != nil {
		t.Errorf("the device is still here, %v", err)
	}
	guest := n.Guest()
	guest.Addresses, guest.Gateways = []string{"192.0.0.2/29", "fd6e:6264::2/64"}, []string{"192.0.0.1", "fd6e:6264::1"}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	err = inNetwork(pid, func() error {
		if err := setUpDevice(name, guest); err != nil {
			return err
		}
		for _, to := range []string{"10.0.0.1:80", "169.254.169.254:80", "192.0.0.1:80"} {
			if c, err := net.Dial("tcp", to); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %v, %v", to, c, err)
			}
		}
		c, err := net.Dial("tcp", "192.0.0.1:"+port)
		if err != nil {
			return err
		}
		defer c.Close()
		got, err := io.ReadAll(c)
		if err == nil && !bytes.Equal(got, data) {
			t.Errorf("%d bytes came of %d", len(got), len(data))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if u := n.Use(); len(u.Refusals) != 3 || u.Received != int64(len(data)) {
		t.Errorf("use is %+v", u)
	}
}

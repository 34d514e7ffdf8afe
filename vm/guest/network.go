package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// A build of a fixed output has a network: a device that its guest gets with the
// order, moved into the build's own network namespace, beside the loopback
// device that all builds have. Nix lets such builds use its host's network; here
// the names and addresses are others, and what is reached is decided outside.

// deviceDeadline is how long the network device may take to appear after it was
// plugged in. The host gives up a guest with hardware before.
const deviceDeadline = 5 * time.Minute

// Files of the /etc of builds with a network. Nix writes the first, and takes
// the others from its host.
const (
	etcNsswitch = "hosts: files dns\nservices: files\n"
	etcServices = "ftp\t21/tcp\nssh\t22/tcp\ndomain\t53/tcp\ndomain\t53/udp\nhttp\t80/tcp\nhttps\t443/tcp\nhttps\t443/udp\n" +
		"rsync\t873/tcp\nsvn\t3690/tcp\ngit\t9418/tcp\n"
)

// makeNetworkFiles writes what resolvers read.
func (s *stage) makeNetworkFiles(n *link.Network) error {
	if n == nil {
		return nil
	}
	for name, text := range map[string]string{
		"resolv.conf": "nameserver " + n.Nameserver + "\n", "nsswitch.conf": etcNsswitch, "services": etcServices,
	} {
		if err := os.WriteFile(filepath.Join(s.root(), "etc", name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return s.makeCertificates(n.Certificates)
}

// startNetwork gives the build its network.
func (b *build) startNetwork() error {
	n := b.order.Network
	if n == nil {
		return nil
	}
	device, err := waitFor(deviceDeadline, func() (string, bool, error) { return findDevice(n.MAC) })
	if err != nil {
		return fmt.Errorf("find network device: %w", err)
	}
	pid := b.kit.sandbox.cmd.Process.Pid
	if err := moveDevice(device, pid); err != nil {
		return fmt.Errorf("move network device: %w", err)
	}
	return inNetwork(pid, func() error { return setUpDevice(device, n) })
}

// findDevice looks for the network device with that address.
func findDevice(mac string) (name string, ok bool, err error) {
	files, err := filepath.Glob("/sys/class/net/*/address")
	if err != nil {
		return "", false, err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", false, err
		}
		if strings.TrimSpace(string(b)) == mac {
			return filepath.Base(filepath.Dir(file)), true, nil
		}
	}
	return "", false, nil
}

// inNetwork runs f in the network namespace of a process.
func inNetwork(pid int, f func() error) error {
	done := make(chan error)
	go func() {
		// The thread ends with this goroutine: nobody else gets it.
		runtime.LockOSThread()
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil {
			err = errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), ns.Close())
		}
		if err != nil {
			done <- fmt.Errorf("enter the build's network: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// setUpDevice gives a device its addresses and routes.
func setUpDevice(name string, n *link.Network) error {
	device, err := net.InterfaceByName(name)
	if err != nil {
		return fmt.Errorf("find network device: %w", err)
	}
	// The addresses are ours alone: nobody is to be asked whether they are free,
	// or for others. A kernel without IPv6 has no such files.
	ipv6 := map[string]string{"accept_dad": "0", "accept_ra": "0", "autoconf": "0", "disable_ipv6": "1"}
	if slices.ContainsFunc(n.Addresses, func(a string) bool { return strings.Contains(a, ":") }) {
		ipv6["disable_ipv6"] = "0"
	}
	for file, value := range ipv6 {
		err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, file), []byte(value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set up network device: %w", err)
		}
	}
	if err := startDevice(device.Index, n.MTU); err != nil {
		return fmt.Errorf("start network device: %w", err)
	}
	for _, text := range n.Addresses {
		a, err := netip.ParsePrefix(text)
		if err == nil {
			err = addAddress(device.Index, a)
		}
		if err != nil {
			return fmt.Errorf("add address %s: %w", text, err)
		}
	}
	for _, text := range n.Gateways {
		a, err := netip.ParseAddr(text)
		if err == nil {
			err = addDefaultRoute(device.Index, a)
		}
		if err != nil {
			return fmt.Errorf("add route by %s: %w", text, err)
		}
	}
	return nil
}

// moveDevice moves a device into the network namespace of a process.
func moveDevice(name string, pid int) error {
	device, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	m := newLinkRequest(device.Index, 0, 0)
	m.number(unix.IFLA_NET_NS_PID, uint32(pid))
	return m.do(unix.RTM_NEWLINK, 0)
}

// startDevice sets the size of packets and brings the device up.
func startDevice(index, mtu int) error {
	m := newLinkRequest(index, unix.IFF_UP, unix.IFF_UP)
	m.number(unix.IFLA_MTU, uint32(mtu))
	return m.do(unix.RTM_NEWLINK, 0)
}

func addAddress(index int, a netip.Prefix) error {
	const noDAD = 0x02 // IFA_F_NODAD
	m := netlinkRequest{family(a.Addr()), byte(a.Bits()), noDAD, unix.RT_SCOPE_UNIVERSE}
	m.add32(uint32(index))
	m.attribute(unix.IFA_LOCAL, a.Addr().AsSlice())
	m.attribute(unix.IFA_ADDRESS, a.Addr().AsSlice())
	return m.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
}

func addDefaultRoute(index int, gateway netip.Addr) error {
	m := netlinkRequest{family(gateway), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST}
	m.add32(0) // flags
	m.attribute(unix.RTA_GATEWAY, gateway.AsSlice())
	m.number(unix.RTA_OIF, uint32(index))
	return m.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// A netlinkRequest is the body of one request to the kernel's routing (man 7
// rtnetlink), without its header.
type netlinkRequest []byte

// newLinkRequest begins with a struct ifinfomsg.
func newLinkRequest(index int, flags, change uint32) netlinkRequest {
	m := netlinkRequest{unix.AF_UNSPEC, 0, 0, 0}
	for _, n := range []uint32{uint32(index), flags, change} {
		m.add32(n)
	}
	return m
}

func (m *netlinkRequest) add32(n uint32) { *m = binary.NativeEndian.AppendUint32(*m, n) }

func (m *netlinkRequest) number(kind uint16, n uint32) {
	m.attribute(kind, binary.NativeEndian.AppendUint32(nil, n))
}

func (m *netlinkRequest) attribute(kind uint16, value []byte) {
	*m = binary.NativeEndian.AppendUint16(*m, uint16(unix.SizeofRtAttr+len(value)))
	*m = binary.NativeEndian.AppendUint16(*m, kind)
	*m = append(*m, value...)
	*m = append(*m, make([]byte, -len(value)&3)...)
}

// do sends the request and returns what the kernel says.
func (m netlinkRequest) do(kind, flags uint16) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(m)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = append(b, make([]byte, 8)...) // sequence and port
	if err := unix.Sendto(fd, append(b, m...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel answers with what is no answer")
	}
	if errno := -int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); errno != 0 {
		return unix.Errno(errno)
	}
	return nil
}

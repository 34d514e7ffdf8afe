package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sort"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func network() {
	interfaces, err := net.Interfaces()
	try("interfaces", err)
	for _, i := range interfaces {
		put("interface "+i.Name, "index %d mtu %d %v", i.Index, i.MTU, i.Flags)
		addresses, err := i.Addrs()
		try("interface "+i.Name+" addresses", err)
		var list []string
		for _, a := range addresses {
			list = append(list, a.String())
		}
		sort.Strings(list)
		put("interface "+i.Name+" has", "%s", strings.Join(list, " "))
	}
	for _, name := range []string{"route", "ipv6_route", "if_inet6", "arp", "dev_mcast", "raw", "unix", "fib_trie"} {
		lines := strings.Split(text("/proc/net/"+name), "\n")
		put("net "+name, "%d lines", len(lines))
	}
	for _, s := range []struct {
		name                 string
		family, kind, number int
	}{
		{"tcp", unix.AF_INET, unix.SOCK_STREAM, 0}, {"tcp6", unix.AF_INET6, unix.SOCK_STREAM, 0}, {"unix", unix.AF_UNIX, unix.SOCK_STREAM, 0},
		{"unix packets", unix.AF_UNIX, unix.SOCK_SEQPACKET, 0}, {"raw", unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP},
		{"ping", unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP}, {"packet", unix.AF_PACKET, unix.SOCK_RAW, 0},
		{"netlink", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE}, {"uevent", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT},
		{"sctp", unix.AF_INET, unix.SOCK_SEQPACKET, unix.IPPROTO_SCTP}, {"alg", unix.AF_ALG, unix.SOCK_SEQPACKET, 0}, {"vsock", unix.AF_VSOCK, unix.SOCK_STREAM, 0},
		{"udplite", unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE}, {"bluetooth", unix.AF_BLUETOOTH, unix.SOCK_RAW, 0}, {"can", unix.AF_CAN, unix.SOCK_RAW, 1},
	} {
		fd, err := unix.Socket(s.family, s.kind, s.number)
		try("socket "+s.name, err)
		if err == nil {
			unix.Close(fd)
		}
	}
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0", "127.0.0.1:80", "127.9.9.9:0"} {
		family := "tcp4" // asked for both, a slow machine would be called twice
		if strings.HasPrefix(address, "[") {
			family = "tcp6"
		}
		try("tcp to "+address, echo(family, address))
	}
	try("udp to 127.0.0.1", echo("udp", "127.0.0.1:0"))
	try("unix socket", echo("unix", "/build/socket"))
	try("abstract socket", echo("unix", "@world"))
	try("socket in /tmp", echo("unix", "/tmp/socket"))
	dialer := net.Dialer{Timeout: 3 * time.Second}
	for _, address := range []string{"1.1.1.1:53", "169.254.169.254:80", "10.0.2.2:80", "192.168.0.1:80", "[2606:4700:4700::1111]:53", "127.0.0.1:1", "[::ffff:1.1.1.1]:53"} {
		c, err := dialer.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		try("reach "+address, root(err))
	}
	for _, name := range []string{"localhost", "example.org", "cache.nixos.org", "nbd"} {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		found, err := net.DefaultResolver.LookupHost(ctx, name)
		cancel()
		sort.Strings(found)
		put("resolve "+name, "%v %s", found, outcome(root(err)))
	}
	host, err := os.Hostname()
	put("host name", "%s %s", host, outcome(err))
}

// root returns the system's error, without addresses that chance has chosen.
func root(err error) error {
	var errno syscall.Errno
	var dns *net.DNSError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &errno):
		return errno
	case errors.As(err, &dns):
		return fmt.Errorf("unknown: %v, timeout: %v", dns.IsNotFound, dns.IsTimeout)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("timeout")
	}
	return err
}

// echo sends a byte to an address of its own.
func echo(network, address string) error {
	if network == "udp" {
		l, err := net.ListenPacket(network, address)
		if err != nil {
			return root(err)
		}
		defer l.Close()
		c, err := net.Dial(network, l.LocalAddr().String())
		if err != nil {
			return root(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte{1}); err != nil {
			return root(err)
		}
		_, _, err = l.ReadFrom(make([]byte, 1))
		return root(err)
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return root(err)
	}
	defer l.Close()
	c, err := net.Dial(network, l.Addr().String())
	if err != nil {
		return root(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		return root(err)
	}
	defer s.Close()
	if _, err := c.Write([]byte{1}); err != nil {
		return root(err)
	}
	_, err = s.Read(make([]byte, 1))
	return root(err)
}

package usernet

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Of the formats: Ethernet II, ARP (RFC 826), IPv4 (RFC 791), IPv6 (RFC 8200),
// UDP (RFC 768), ICMP (RFC 792, RFC 4443) and neighbour discovery (RFC 4861).
const (
	etherHeader = 14
	etherIPv4   = 0x0800
	etherARP    = 0x0806
	etherIPv6   = 0x86dd

	ipv4Header = 20
	ipv6Header = 40
	tcpHeader  = 20
	udpHeader  = 8

	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58

	portDNS = 53
)

// A packet is an IP packet of the guest that is as it should be.
type packet struct {
	src, dst netip.Addr
	proto    byte
	ip       []byte // all of it
	payload  []byte // what is behind the IP header
}

// receive does what a frame of the guest asks for. The frame is the caller's
// again when it returns.
func (n *Network) receive(frame []byte) {
	if len(frame) < etherHeader || !bytes.Equal(frame[6:12], guestMAC[:]) {
		return
	}
	etherType, data := binary.BigEndian.Uint16(frame[12:]), frame[etherHeader:]
	switch etherType {
	case etherARP:
		n.reply(answerARP(data))
	case etherIPv4:
		if p, ok := parseIPv4(data); ok {
			n.route(p)
		}
	case etherIPv6:
		if p, ok := parseIPv6(data); ok && n.ipv6 {
			n.route(p)
		}
	}
}

// route passes on a packet.
func (n *Network) route(p packet) {
	switch {
	case p.proto == protoICMPv6:
		n.reply(answerNeighbour(p))
	case p.proto == protoUDP:
		n.datagram(p)
	case p.proto == protoTCP && wholeTCP(p.payload):
		protocol := tcpip.NetworkProtocolNumber(ipv4.ProtocolNumber)
		if p.src.Is6() {
			protocol = ipv6.ProtocolNumber
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(bytes.Clone(p.ip))})
		n.ep.InjectInbound(protocol, pkt)
		pkt.DecRef()
	}
}

// wholeTCP reports whether a TCP header is all there.
func wholeTCP(b []byte) bool {
	return len(b) >= tcpHeader && int(b[12]>>4)*4 >= tcpHeader && int(b[12]>>4)*4 <= len(b)
}

// datagram answers a name lookup and refuses all else.
func (n *Network) datagram(p packet) {
	b := p.payload
	if len(b) < udpHeader {
		return
	}
	size := int(binary.BigEndian.Uint16(b[4:]))
	if size < udpHeader || size > len(b) {
		return
	}
	from, to := binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	if to != portDNS || p.dst != gateway4 && p.dst != gateway6 {
		n.use.refuse(netip.AddrPortFrom(p.dst, to), "", "only TCP is passed on, not UDP")
		n.reply(unreachable(p))
		return
	}
	if !n.begin() {
		return
	}
	query := bytes.Clone(b[udpHeader:size])
	started := n.dns.start(func() {
		defer n.work.Done()
		if answer := n.dns.answer(n.ctx, query); answer != nil {
			n.reply(udpFrame(p.dst, p.src, to, from, answer))
		}
	})
	if !started {
		n.work.Done()
	}
}

// parseIPv4 reads a packet without options or fragments that the guest sent
// from its own address to a single other one.
func parseIPv4(b []byte) (p packet, ok bool) {
	if len(b) < ipv4Header || b[0] != 4<<4|ipv4Header/4 {
		return p, false
	}
	size := int(binary.BigEndian.Uint16(b[2:]))
	fragment := binary.BigEndian.Uint16(b[6:]) &^ (1 << 14) // all but "don't"
	if size < ipv4Header || size > len(b) || fragment != 0 || checksum.Checksum(b[:ipv4Header], 0) != 0xffff {
		return p, false
	}
	p = packet{src: netip.AddrFrom4([4]byte(b[12:16])), dst: netip.AddrFrom4([4]byte(b[16:20])),
		proto: b[9], ip: b[:size], payload: b[ipv4Header:size]}
	return p, p.src == guest4 && p.dst != guest4 && single(p.dst) && p.proto != protoICMPv6
}

// parseIPv6 is parseIPv4 for IPv6, without extension headers. Neighbours may
// be looked for from the link-local address and with a multicast.
func parseIPv6(b []byte) (p packet, ok bool) {
	if len(b) < ipv6Header || b[0]>>4 != 6 {
		return p, false
	}
	size := ipv6Header + int(binary.BigEndian.Uint16(b[4:]))
	if size > len(b) {
		return p, false
	}
	p = packet{src: netip.AddrFrom16([16]byte(b[8:24])), dst: netip.AddrFrom16([16]byte(b[24:40])),
		proto: b[6], ip: b[:size], payload: b[ipv6Header:size]}
	if p.src.Is4In6() || p.dst.Is4In6() {
		return p, false // what IPv4 is for
	}
	if p.proto == protoICMPv6 {
		return p, p.src == guest6 || p.src.IsLinkLocalUnicast()
	}
	return p, p.src == guest6 && p.dst != guest6 && single(p.dst)
}

// single reports whether an address is of one host and not of this one.
func single(a netip.Addr) bool {
	return !a.IsMulticast() && !a.IsUnspecified() && !a.IsLoopback() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// appendEther appends the header of a frame to the guest.
func appendEther(b []byte, etherType uint16) []byte {
	b = append(b, guestMAC[:]...)
	b = append(b, gatewayMAC[:]...)
	return binary.BigEndian.AppendUint16(b, etherType)
}

// answerARP answers who asks for the gateway; nil if the guest does not.
func answerARP(b []byte) []byte {
	const size = 28
	ask := []byte{0, 1, 8, 0, 6, 4, 0, 1} // Ethernet, IPv4, their lengths, request
	if len(b) < size || !bytes.Equal(b[:8], ask) || !bytes.Equal(b[8:14], guestMAC[:]) {
		return nil
	}
	sender, target := b[14:18], b[24:28]
	if !bytes.Equal(sender, guest4.AsSlice()) || !bytes.Equal(target, gateway4.AsSlice()) {
		return nil
	}
	f := appendEther(make([]byte, 0, etherHeader+size), etherARP)
	f = append(f, ask[:7]...)
	f = append(f, 2) // reply
	f = append(f, gatewayMAC[:]...)
	f = append(f, target...)
	f = append(f, guestMAC[:]...)
	return append(f, sender...)
}

// answerNeighbour is answerARP for IPv6.
func answerNeighbour(p packet) []byte {
	const solicitation, advertisement = 135, 136
	b := p.payload
	if len(b) < 24 || b[0] != solicitation || !bytes.Equal(b[8:24], gateway6.AsSlice()) {
		return nil
	}
	m := []byte{advertisement, 0, 0, 0, 0xe0, 0, 0, 0} // from a router, asked for, valid
	m = append(m, gateway6.AsSlice()...)
	m = append(m, 2, 1) // option: link-layer address, of 8 bytes with this
	m = append(m, gatewayMAC[:]...)
	return ipFrame(gateway6, p.src, protoICMPv6, m)
}

// unreachable tells the guest that nobody takes a datagram of its, from where
// it was sent to.
func unreachable(p packet) []byte {
	m := make([]byte, 8, 64)
	if p.dst.Is4() {
		m[0], m[1] = 3, 3
		m = append(m, p.ip[:ipv4Header+udpHeader]...)
		return ipFrame(p.dst, p.src, protoICMP, m)
	}
	m[0], m[1] = 1, 4
	m = append(m, p.ip[:ipv6Header+udpHeader]...)
	return ipFrame(p.dst, p.src, protoICMPv6, m)
}

// udpFrame makes a frame with a datagram.
func udpFrame(src, dst netip.Addr, from, to uint16, data []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint16(b, uint16(udpHeader+len(data)))
	b = append(b, 0, 0)
	return ipFrame(src, dst, protoUDP, append(b, data...))
}

// ipFrame makes a frame with an IP packet, whose payload gets its checksum.
func ipFrame(src, dst netip.Addr, proto byte, payload []byte) []byte {
	at := map[byte]int{protoICMP: 2, protoICMPv6: 2, protoTCP: 16, protoUDP: 6}[proto]
	sum := uint16(0)
	if proto != protoICMP { // it has no pseudo header
		sum = checksum.Checksum(src.AsSlice(), sum)
		sum = checksum.Checksum(dst.AsSlice(), sum)
		sum = checksum.Combine(sum, uint16(proto))
		sum = checksum.Combine(sum, uint16(len(payload)))
	}
	sum = ^checksum.Checksum(payload, sum)
	if sum == 0 {
		sum = 0xffff // zero would be none
	}
	binary.BigEndian.PutUint16(payload[at:], sum)
	if src.Is6() {
		f := appendEther(make([]byte, 0, etherHeader+ipv6Header+len(payload)), etherIPv6)
		f = append(f, 6<<4, 0, 0, 0)
		f = binary.BigEndian.AppendUint16(f, uint16(len(payload)))
		f = append(f, proto, 255) // the hop limit that neighbours must have
		f = append(f, src.AsSlice()...)
		f = append(f, dst.AsSlice()...)
		return append(f, payload...)
	}
	f := appendEther(make([]byte, 0, etherHeader+ipv4Header+len(payload)), etherIPv4)
	f = append(f, 4<<4|ipv4Header/4, 0)
	f = binary.BigEndian.AppendUint16(f, uint16(ipv4Header+len(payload)))
	f = append(f, 0, 0, 0, 0, 64, proto, 0, 0)
	f = append(f, src.AsSlice()...)
	f = append(f, dst.AsSlice()...)
	head := f[etherHeader:]
	binary.BigEndian.PutUint16(head[10:], ^checksum.Checksum(head, 0))
	return append(f, payload...)
}

package server

import (
	"fmt"

	"nbd/store"
)

// An apiNetwork is what a build did with its network.
type apiNetwork struct {
	SentBytes     int64     `json:"sent_bytes"`
	ReceivedBytes int64     `json:"received_bytes"`
	Hosts         []apiHost `json:"hosts"` // that it was connected to
	// MoreConnections is how many of its connections are not among Hosts.
	MoreConnections int      `json:"more_connections"`
	Refused         []string `json:"refused"` // lines for a person
	// Private says that it was connected to an address that is not public.
	Private bool `json:"private"`
}

// An apiHost is a host that a build was connected to.
type apiHost struct {
	Name          string `json:"name"`    // by which it asked for the address; may be ""
	Address       string `json:"address"` // with the port
	SentBytes     int64  `json:"sent_bytes"`
	ReceivedBytes int64  `json:"received_bytes"`
}

func newAPINetwork(n *store.BuildNetwork) *apiNetwork {
	if n == nil {
		return nil
	}
	o := &apiNetwork{SentBytes: n.Sent, ReceivedBytes: n.Received, Hosts: []apiHost{}, MoreConnections: n.MoreHosts, Refused: []string{}, Private: n.Private}
	o.Refused = append(o.Refused, n.Refused...)
	for _, h := range n.Hosts {
		o.Hosts = append(o.Hosts, apiHost{Name: h.Name, Address: h.Address, SentBytes: h.Sent, ReceivedBytes: h.Received})
	}
	return o
}

// rows are the lines about a network.
func (n *apiNetwork) rows() (rows [][2]string) {
	if n == nil {
		return nil
	}
	rows = append(rows, [2]string{"network", fmt.Sprintf("%d bytes sent, %d received", n.SentBytes, n.ReceivedBytes)})
	for _, h := range n.Hosts {
		to := h.Address
		if h.Name != "" {
			to = h.Name + " (" + to + ")"
		}
		rows = append(rows, [2]string{"connected", fmt.Sprintf("%s: %d bytes sent, %d received", to, h.SentBytes, h.ReceivedBytes)})
	}
	if n.MoreConnections > 0 {
		rows = append(rows, [2]string{"connected", fmt.Sprintf("%d times more", n.MoreConnections)})
	}
	for _, r := range n.Refused {
		rows = append(rows, [2]string{"refused", r})
	}
	return rows
}

package store

// A BuildNetwork is what a build did with its network.
type BuildNetwork struct {
	Sent     int64 `json:"sent"`     // bytes
	Received int64 `json:"received"` // bytes
	// Hosts are those that it was connected to; MoreHosts is how many
	// connections are not among them.
	Hosts     []BuildHost `json:"hosts,omitempty"`
	MoreHosts int         `json:"moreHosts,omitempty"`
	// Refused are lines for a person: what it was not connected to, and why.
	Refused []string `json:"refused,omitempty"`
	// Private says that it was connected to an address that is not public.
	Private bool `json:"private,omitempty"`
}

// A BuildHost is a host that a build was connected to.
type BuildHost struct {
	Name     string `json:"name,omitempty"` // by which it asked for the address
	Address  string `json:"address"`        // with the port
	Sent     int64  `json:"sent"`           // bytes
	Received int64  `json:"received"`       // bytes
}

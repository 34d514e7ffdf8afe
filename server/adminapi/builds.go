package adminapi

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// A Build is a build of any account as operators see it. Its JSON form is that
// which the account itself is shown, with the account's name and the decisions
// beside it; what is decoded here is what text needs.
type Build struct {
	Account       string     `json:"account"`
	ID            uint64     `json:"build_id"`
	Status        string     `json:"status"`
	Message       string     `json:"status_message"`
	Created       time.Time  `json:"create_time"`
	Duration      float64    `json:"duration_seconds"`
	CPUSeconds    int64      `json:"cpu_seconds"`
	CPUs          int        `json:"cpu_count"`
	Derivation    string     `json:"derivation_path"`
	System        string     `json:"system"`
	PeakMemoryKiB int64      `json:"peak_memory_use_kilobytes"`
	Decisions     []Decision `json:"decisions"`
	Network       *Network   `json:"network"` // nil: it had none

	raw json.RawMessage
}

// A Decision is one check on the way to an answer.
type Decision struct {
	Check  string `json:"check"`
	Taken  bool   `json:"taken"`
	Reason string `json:"reason"`
}

// A Network is what a build did with its network.
type Network struct {
	Sent     int64 `json:"sent_bytes"`
	Received int64 `json:"received_bytes"`
	// Hosts are those that it was connected to; More is how many connections are
	// not among them.
	Hosts   []Host   `json:"hosts"`
	More    int      `json:"more_connections"`
	Refused []string `json:"refused"` // lines for a person
	// Private says that it was connected to an address that is not public.
	Private bool `json:"private"`
}

// Rows are lines about it for a person, in two columns; nil has none.
func (n *Network) Rows() (rows [][2]string) {
	if n == nil {
		return nil
	}
	rows = append(rows, [2]string{"network", fmt.Sprintf("%d bytes sent, %d received", n.Sent, n.Received)})
	for _, h := range n.Hosts {
		to := h.Address
		if h.Name != "" {
			to = h.Name + " (" + to + ")"
		}
		rows = append(rows, [2]string{"connected", fmt.Sprintf("%s: %d bytes sent, %d received", to, h.Sent, h.Received)})
	}
	if n.More > 0 {
		rows = append(rows, [2]string{"connected", fmt.Sprintf("%d times more", n.More)})
	}
	for _, r := range n.Refused {
		rows = append(rows, [2]string{"refused", r})
	}
	return rows
}

// A Host is a host that a build was connected to.
type Host struct {
	Name     string `json:"name"`    // by which it asked for the address; may be ""
	Address  string `json:"address"` // with the port
	Sent     int64  `json:"sent_bytes"`
	Received int64  `json:"received_bytes"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (b *Build) UnmarshalJSON(text []byte) error {
	type plain Build
	if err := json.Unmarshal(text, (*plain)(b)); err != nil {
		return err
	}
	b.raw = append(json.RawMessage(nil), text...)
	return nil
}

// MarshalJSON implements json.Marshaler: all that the server said.
func (b Build) MarshalJSON() ([]byte, error) { return b.raw, nil }

// A BuildFilter selects builds; zero fields select all.
type BuildFilter struct {
	Account string   // by name
	Status  []string // any of them
	Tags    []string // NAME:VALUE, all of them
	Reused  bool     // requests that were answered without a run, too
	Limit   int      // 0 is for the server to choose
}

// Builds lists builds, the newest first.
func (c *Client) Builds(ctx context.Context, f BuildFilter) (list []Build, err error) {
	q := url.Values{"account": {f.Account}, "status": f.Status, "tags": f.Tags, "reused": {strconv.FormatBool(f.Reused)}, "limit": {strconv.Itoa(f.Limit)}}
	return list, c.do(ctx, http.MethodGet, "/builds", q, nil, &list)
}

// Build tells of one build.
func (c *Client) Build(ctx context.Context, id uint64) (b Build, err error) {
	return b, c.do(ctx, http.MethodGet, fmt.Sprintf("/builds/%d", id), nil, nil, &b)
}

// BuildLog copies the log of a build to w, live while it runs.
func (c *Client) BuildLog(ctx context.Context, id uint64, w io.Writer) error {
	answer, err := c.ask(ctx, http.MethodGet, fmt.Sprintf("/builds/%d/log", id), nil, nil)
	if err != nil {
		return err
	}
	defer answer.Close()
	_, err = io.Copy(w, answer)
	return err
}

// CancelBuild ends a build that waits or runs.
func (c *Client) CancelBuild(ctx context.Context, id uint64) error {
	return c.do(ctx, http.MethodPost, fmt.Sprintf("/builds/%d/cancel", id), nil, nil, nil)
}

// A QueueState is who waits, and for what.
type QueueState struct {
	Queue
	Builds []QueuedBuild `json:"builds"` // those that wait, the next one first
}

// A QueuedBuild is a build that waits.
type QueuedBuild struct {
	ID      uint64    `json:"build_id"`
	Account string    `json:"account"`
	Since   time.Time `json:"since"`
	Ahead   int       `json:"ahead"` // builds that start before it
	Lacks   string    `json:"lacks"` // what there is not enough of
}

// Queue tells who waits.
func (c *Client) Queue(ctx context.Context) (q QueueState, err error) {
	return q, c.do(ctx, http.MethodGet, "/queue", nil, nil, &q)
}

// A Revoked result is no longer reused.
type Revoked struct {
	Key     string `json:"key"`
	Records int    `json:"records"` // that were forgotten
}

// Revoke takes a stored result out; what is a reuse key, or the id of a build
// that has it.
func (c *Client) Revoke(ctx context.Context, what string) (r Revoked, err error) {
	return r, c.do(ctx, http.MethodPost, "/results/revoke", url.Values{"what": {what}}, nil, &r)
}

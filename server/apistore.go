package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/store"
)

// storeCommands are about the account's store paths.
func storeCommands() []apiCommand {
	return []apiCommand{
		{name: "store list", args: "[TEXT]", need: StoreRead, run: listPaths, text: listText("", "no paths", printPath),
			help: "list the store paths that the account brought or built",
			more: "With TEXT only those with it in their name."},
		{name: "store info", args: "[PATH]", need: StoreRead, run: storeInfo, text: printStoreInfo,
			help: "say how much the account has in its store, or what is known of a path"},
	}
}

// An apiPath is a path in the account's view.
type apiPath struct {
	Path         string `json:"path"`
	NarHash      string `json:"nar_hash"`
	NarSizeBytes uint64 `json:"nar_size_bytes"`
}

// An apiPathInfo is all that is known of a path.
type apiPathInfo struct {
	apiPath
	References       []string `json:"references"`
	Deriver          *string  `json:"deriver"`
	RegistrationTime apiTime  `json:"registration_time"`
	ContentAddress   *string  `json:"content_address"`
	Signatures       []string `json:"signatures"`
	ClosureSizeBytes uint64   `json:"closure_size_bytes"`
}

// An apiStore says how much is in the account's view.
type apiStore struct {
	PathCount    int    `json:"path_count"`
	NarSizeBytes uint64 `json:"nar_size_bytes"`
}

// ownPaths are the paths in the account's view with what is known of them. A
// path that goes meanwhile is not among them.
func (c *apiCall) ownPaths(ctx context.Context, name string) apiSeq[apiPath] {
	return func(yield func(apiPath, error) bool) {
		paths, err := c.server.store.All(ctx, c.account())
		if err != nil {
			yield(apiPath{}, err)
			return
		}
		for _, p := range paths {
			if !strings.Contains(p.Base(), name) {
				continue
			}
			info, err := c.server.store.Info(ctx, c.account(), p)
			if errors.Is(err, store.ErrNotFound) {
				continue
			}
			if err != nil {
				yield(apiPath{}, err)
				return
			}
			if !yield(newAPIPath(info), nil) {
				return
			}
		}
	}
}

func newAPIPath(info *nixproto.PathInfo) apiPath {
	return apiPath{string(info.Path), info.NarHash.String(), info.NarSize}
}

func listPaths(ctx context.Context, c *apiCall) (any, error) {
	return c.ownPaths(ctx, strings.Join(c.args, "")), nil
}

func printPath(w io.Writer, p apiPath) error {
	_, err := fmt.Fprintf(w, "%12d  %s\n", p.NarSizeBytes, p.Path)
	return err
}

func storeInfo(ctx context.Context, c *apiCall) (any, error) {
	if len(c.args) > 0 {
		return c.pathInfo(ctx)
	}
	sum := apiStore{}
	for p, err := range c.ownPaths(ctx, "") {
		if err != nil {
			return nil, err
		}
		sum.PathCount++
		sum.NarSizeBytes += p.NarSizeBytes
	}
	return sum, nil
}

func (c *apiCall) pathInfo(ctx context.Context) (any, error) {
	p, err := nixproto.ParseStorePath(c.args[0])
	if err != nil {
		if p, err = nixproto.ParseBaseName(c.args[0]); err != nil {
			return nil, usagef("%q is no store path", clip(c.args[0]))
		}
	}
	infos, err := c.server.store.ClosureInfo(ctx, c.account(), []nixproto.StorePath{p})
	if errors.Is(err, store.ErrNotFound) {
		return nil, notFoundf("there is no path %s", p)
	} else if err != nil {
		return nil, err
	}
	info := &infos[len(infos)-1] // each path comes after those it refers to
	v := apiPathInfo{apiPath: newAPIPath(info), References: []string{}, Signatures: []string{},
		RegistrationTime: apiTime{time.Unix(info.RegistrationTime, 0)}, Deriver: optText(string(info.Deriver)), ContentAddress: optText(info.CA)}
	for _, r := range info.References {
		v.References = append(v.References, string(r))
	}
	v.Signatures = append(v.Signatures, info.Signatures...)
	for i := range infos {
		v.ClosureSizeBytes += infos[i].NarSize
	}
	return v, nil
}

// optText is a text that may not be there.
func optText(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func printStoreInfo(w io.Writer, v any) error {
	if sum, ok := v.(apiStore); ok {
		return printRows(w, [][2]string{{"paths", fmt.Sprint(sum.PathCount)}, {"size", fmt.Sprintf("%d bytes (%d MiB)", sum.NarSizeBytes, sum.NarSizeBytes>>20)}})
	}
	p := v.(apiPathInfo)
	rows := [][2]string{{"path", p.Path}, {"hash", p.NarHash}, {"size", fmt.Sprintf("%d bytes, with all it refers to %d", p.NarSizeBytes, p.ClosureSizeBytes)},
		{"since", p.RegistrationTime.String()}}
	if p.Deriver != nil {
		rows = append(rows, [2]string{"deriver", *p.Deriver})
	}
	if p.ContentAddress != nil {
		rows = append(rows, [2]string{"address", *p.ContentAddress})
	}
	for _, s := range p.Signatures {
		rows = append(rows, [2]string{"signature", s})
	}
	for _, r := range p.References {
		rows = append(rows, [2]string{"reference", r})
	}
	return printRows(w, rows)
}

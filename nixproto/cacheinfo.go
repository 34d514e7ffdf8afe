package nixproto

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// CacheInfo is what a binary cache says of itself: "nix-cache-info" (Nix's
// binary-cache-store.cc).
type CacheInfo struct {
	StoreDir string // "" if it does not say
	// WantMassQuery says that the cache answers many queries fast.
	WantMassQuery bool
	// Priority orders caches, the lowest first; DefaultCachePriority if the
	// cache does not say.
	Priority int
}

// DefaultCachePriority is that of a cache that does not name one.
const DefaultCachePriority = 50

// maxCacheInfo bounds the text of a nix-cache-info, in bytes.
const maxCacheInfo = 64 << 10

// AppendText appends the text of the nix-cache-info. It returns no error; the
// result is that of encoding.TextAppender.
func (c *CacheInfo) AppendText(b []byte) ([]byte, error) {
	if c.StoreDir != "" {
		b = fmt.Appendf(b, "StoreDir: %s\n", c.StoreDir)
	}
	query := 0
	if c.WantMassQuery {
		query = 1
	}
	return fmt.Appendf(b, "WantMassQuery: %d\nPriority: %d\n", query, c.Priority), nil
}

// ParseCacheInfo reads a nix-cache-info. As in Nix, unknown fields and lines
// without a field are passed over, and the last line needs no end.
func ParseCacheInfo(text []byte) (*CacheInfo, error) {
	if len(text) > maxCacheInfo {
		return nil, fmt.Errorf("parse nix-cache-info: longer than %d bytes", maxCacheInfo)
	}
	c := &CacheInfo{Priority: DefaultCachePriority}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "StoreDir":
			if !strings.HasPrefix(value, "/") || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' }) {
				return nil, errors.New("parse nix-cache-info: StoreDir is no path")
			}
			c.StoreDir = value
		case "WantMassQuery":
			c.WantMassQuery = value == "1"
		case "Priority":
			n, err := strconv.ParseInt(value, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("parse nix-cache-info: Priority %q is no number", clip(value))
			}
			c.Priority = int(n)
		}
	}
	return c, nil
}

package nixproto

// PathInfo is what a store knows of one valid path (ValidPathInfo on the
// worker protocol, narinfo in a binary cache).
type PathInfo struct {
	Path       StorePath
	Deriver    StorePath   // "" if unknown
	NarHash    Hash        // always SHA-256
	NarSize    uint64      // bytes of the NAR, magic and padding included
	References []StorePath // sorted bytewise, may include Path itself
	// RegistrationTime is in Unix seconds; 0 if unknown.
	RegistrationTime int64
	Ultimate         bool     // built here, not copied from elsewhere
	Signatures       []string // "name:base64"
	CA               string   // content address as in narinfo; "" if input-addressed
}
